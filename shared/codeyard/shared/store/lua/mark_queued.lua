-- The broker has confirmed `publication`. Never overwrites a live owner or a final state.
return each_job(function(job, request)
  local record = load_record(job, "state", "lease_until", "queued_at", "deadline_at", "alone", "crashes", "alone_crashes")

  if not record then return "missing" end
  if was_never_accepted(job, record) then return "lapsed" end
  if FINAL[record.state] or is_live(record) then return "passed" end
  if record.state == "running" then drop_lost_owner(record) end
  change(record, {
    state = "queued",
    publication = request.publication,
    queued_at = record.queued_at > 0 and record.queued_at or now,
    check_at = math.min(record.deadline_at, now + timing.queue_check_s),
  })
  save(job, record)
  return "queued"
end)
