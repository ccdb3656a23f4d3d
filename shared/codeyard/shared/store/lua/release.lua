-- The owner gives the job up on purpose, which makes nobody a suspect. A cancel asked for meanwhile ends it.
return each_job(function(job, request)
  local record = load_record(
    job, "state", "fence", "attempt", "cancel_requested", "deadline_at", "last_seq", "expires_at", "callback"
  )

  if not record or record.fence ~= request.fence or FINAL[record.state] then return "fenced" end
  if record.state ~= "running" then return "released" end -- a repeat: nobody claimed it since
  if record.cancel_requested then
    cancel_now(job, record)
    return "released"
  end
  change(record, {
    state = "queued",
    publication = request.publication,
    owner = "",
    lease_until = 0,
    alone = false,
    attempt = request.charge and record.attempt or record.attempt - 1,
    check_at = math.min(record.deadline_at, now + request.delay_s + timing.queue_check_s),
  })
  save(job, record)
  return "released"
end)
