-- The owner gives the job up on purpose, which makes nobody a suspect. A cancel asked for meanwhile ends it.
return each_job(function(job)
  local fence, publication, delay_s, charge = take(), take(), take_number(), take_flag()
  local record = load_record(job, "state", "fence", "attempt", "cancel_requested", "deadline_at", "last_seq", "expires_at")

  if not record or record.fence ~= fence or FINAL[record.state] then return "fenced" end
  if record.state ~= "running" then return "released" end -- a repeat: nobody claimed it since
  if record.cancel_requested then
    cancel_now(job, record)
    return "released"
  end
  change(record, {
    state = "queued",
    publication = publication,
    owner = "",
    lease_until = 0,
    alone = false,
    attempt = charge and record.attempt or record.attempt - 1,
    check_at = math.min(record.deadline_at, now + delay_s + timing.queue_check_s),
  })
  save(job, record)
  return "released"
end)
