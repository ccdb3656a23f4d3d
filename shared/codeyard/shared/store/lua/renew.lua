-- The owner is alive. A lease that lapsed but was not taken is simply longer.
return each_job(function(job, request)
  local record = load_record(job, "state", "fence", "alone", "cancel_requested")

  if not record or not owns(record, request.fence) then return { false, false } end
  change(record, {
    lease_until = now + timing.lease_s,
    check_at = now + timing.lease_s + timing.grace_s,
    alone = record.alone or request.alone,
  })
  save(job, record)
  return { true, record.cancel_requested }
end)
