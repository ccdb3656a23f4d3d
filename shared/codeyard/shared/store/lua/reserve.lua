-- New, attach, or conflict. A job that was never accepted may be submitted again under its key.
return each_job(function(job, request)
  local record = load_record(job, "state", "digest", "publication")

  if record and not was_never_accepted(job, record) then
    if record.digest ~= request.digest then return { "conflict", load_stored(job) } end
    local own = record.publication == request.publication and record.state == "reserved"
    return { own and "new" or "attached", load_stored(job) }
  end
  local deadline_at = now + request.timeout_s
  save(job, new_record(job, {
    state = "reserved",
    job = ARGV[request.body],
    digest = request.digest,
    incarnation = request.incarnation,
    publication = request.publication,
    created_at = now,
    deadline_at = deadline_at,
    check_at = math.min(deadline_at, now + timing.unpublished_s),
    expires_at = deadline_at + timing.longest_run_s + timing.retention_s,
    callback = request.callback and "waiting" or "",
  }))
  local stored = load_stored(job)
  stored[3] = "" -- the job, which the caller has
  return { "new", stored }
end)
