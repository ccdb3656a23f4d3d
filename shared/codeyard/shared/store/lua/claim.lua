-- The claim table of docs/protocol.md, row by row.

-- A publisher that did not reserve, or a store that lost the record.
local function from_message(job, request)
  local asked = request.deadline_at or (request.published_at or now) + request.timeout_s
  local deadline_at = math.min(asked, now + timing.max_timeout_s)
  return new_record(job, {
    state = "queued",
    job = ARGV[request.body],
    digest = request.digest,
    incarnation = request.incarnation ~= "" and request.incarnation or request.publication,
    publication = request.publication,
    created_at = now,
    queued_at = now,
    deadline_at = deadline_at,
    expires_at = deadline_at + timing.longest_run_s + timing.retention_s,
    callback = request.callback and "waiting" or "",
  })
end

local function claimed(verdict, record)
  return {
    verdict, record.fence, record.attempt, decimal(record.deadline_at - now), decimal(now - record.created_at),
    record.last_seq, record.crashes > 0,
  }
end

return each_job(function(job, request)
  local record = load_record(
    job, "state", "digest", "incarnation", "publication", "owner", "lease_until", "counter", "fence", "attempt",
    "crashes", "alone", "alone_crashes", "cancel_requested", "created_at", "queued_at", "deadline_at", "last_seq",
    "expires_at", "callback"
  )

  if not record then
    record = from_message(job, request)
    if record.deadline_at <= now then return { "record_missing" } end
  elseif request.incarnation ~= "" and request.incarnation ~= record.incarnation then
    return { "duplicate" }
  elseif request.digest ~= record.digest then
    return { "conflict" }
  end

  if FINAL[record.state] then return { "final" } end
  if record.cancel_requested then
    cancel_now(job, record)
    return { "cancelled" }
  end
  if record.deadline_at <= now then
    expire_now(job, record)
    return { "expired" }
  end

  if is_live(record) then
    if record.publication ~= request.publication then return { "duplicate" } end
    if record.owner == request.owner then return claimed("adopt", record) end
    return { "hold", decimal(record.lease_until - now) }
  end

  if record.state == "running" then drop_lost_owner(record) end
  local counter = record.counter + 1
  change(record, {
    state = "running",
    publication = request.publication,
    counter = counter,
    fence = string.format("%s.%d", record.incarnation, counter),
    owner = request.owner,
    lease_until = now + timing.lease_s,
    attempt = record.attempt + 1,
    queued_at = record.queued_at > 0 and record.queued_at or now,
    started_at = now,
    check_at = now + timing.lease_s + timing.grace_s,
  })
  save(job, record)
  return claimed(record.alone_crashes >= timing.poison_after and "poison" or "run", record)
end)
