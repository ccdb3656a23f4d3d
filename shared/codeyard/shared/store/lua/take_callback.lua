-- One deliverer at a time, as long as it is heard of within its lease; after that, at least once.
return each_job(function(job, request)
  local record = load_record(job, "state", "callback", "callback_at", "callback_attempts")

  if not record or record.callback ~= "due" then
    redis.call("ZREM", job.callbacks, job.id) -- its keys ended with their TTL; the index would name it for ever
    return false
  end
  if record.callback_at > now then return false end
  change(record, { callback_attempts = record.callback_attempts + 1, callback_at = now + request.lease_s })
  save(job, record)
  return load_stored(job)
end)
