-- A dead job runs once more under its id: a new incarnation, the old outcome kept in its history.

local function past(incarnation, attempt, result)
  return '{"incarnation":' .. cjson.encode(incarnation) .. ',"attempt":' .. attempt .. ',"result":' .. result .. "}"
end

local function lives_again(job, request, history)
  while #history > timing.max_history do table.remove(history, 1) end
  local deadline_at = now + request.timeout_s
  redis.call("ZREM", job.callbacks, job.id) -- of its last life
  save(job, new_record(job, {
    state = "queued",
    job = ARGV[request.body],
    digest = request.digest,
    incarnation = request.incarnation,
    publication = request.publication,
    created_at = now,
    deadline_at = deadline_at,
    check_at = math.min(deadline_at, now + timing.republish_retry_s),
    expires_at = deadline_at + timing.longest_run_s + timing.retention_s,
    history = cjson.encode(history),
    callback = request.callback and "waiting" or "",
  }))
  return { "redriven", load_stored(job) }
end

local function came_from(history, incarnation)
  for _, life in ipairs(history) do
    if cjson.decode(life).incarnation == incarnation then return true end
  end
  return false
end

return each_job(function(job, request)
  local record = load_record(job, "state", "digest", "incarnation", "counter", "attempt", "queued_at")

  if not record then return lives_again(job, request, { past(request.died_in, 0, ARGV[request.result]) }) end
  if record.digest ~= request.digest then return { "conflict" } end
  local kept = load_long(job, "history")
  local history = kept and kept ~= "" and cjson.decode(kept) or {} -- records of older versions have none
  local unused = record.state == "expired" and record.counter == 0
  if record.incarnation ~= request.died_in then
    if not came_from(history, request.died_in) then return { "superseded" } end
    if is_unpublished(record) then return { "redriven", load_stored(job) } end
    if not unused then return { "already" } end
  elseif not FINAL[record.state] then
    return { "live" }
  elseif record.state ~= "failed" and record.state ~= "expired" then
    return { "ended" }
  end
  history[#history + 1] = past(record.incarnation, record.attempt, load_long(job, "result"))
  return lives_again(job, request, history)
end)
