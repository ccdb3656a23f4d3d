-- A due job: expire it, leave it, or have it published again.
return each_job(function(job, request)
  local queue_empty = request.queue_empty -- nil where the queue was not asked about
  local record = load_record(
    job, "state", "check_at", "lease_until", "cancel_requested", "deadline_at", "queued_at", "last_seq", "expires_at",
    "callback"
  )

  if not record or FINAL[record.state] then
    redis.call("ZREM", job.due, job.id) -- its keys ended with their TTL; the index would name it for ever
    return { "not_due" }
  end
  if record.check_at > now and queue_empty == nil then return { "not_due" } end
  if is_live(record) then
    change(record, { check_at = record.lease_until + timing.grace_s })
    save(job, record)
    return { "not_due" }
  end
  if record.cancel_requested then
    cancel_now(job, record)
    return { "not_due" }
  end
  if record.deadline_at <= now then
    expire_now(job, record)
    return { "expired" }
  end
  if record.state == "reserved" then
    change(record, { callback = "" }) -- nobody was told that it is accepted
    end_as(job, record, "expired", timing.never_published, "the broker never confirmed it; submit it again")
    return { "expired" }
  end
  if record.state == "running" or is_unpublished(record) or queue_empty then
    change(record, { check_at = math.min(record.deadline_at, now + timing.republish_retry_s) })
    save(job, record)
    return { "republish", load_stored(job) }
  end
  if queue_empty == nil then return { "ask_queue", load_stored(job) } end
  local wait_s = math.min(timing.max_queue_check_s, math.max(timing.queue_check_s, now - record.queued_at))
  change(record, { check_at = math.min(record.deadline_at, now + wait_s) })
  save(job, record)
  return { "not_due" }
end)
