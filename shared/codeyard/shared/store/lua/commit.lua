-- First one wins. Refused for its fence, the delivery may go only if nobody counts on it.
return each_job(function(job, request)
  local record = load_record(job, "state", "fence", "publication", "last_seq", "expires_at", "callback")

  if not record then return { "fenced", false } end
  if FINAL[record.state] then
    local mine = record.fence == request.fence and load_long(job, "result") == ARGV[request.result]
    return { mine and "committed" or "already_final", true }
  end
  local fresh = fresh_of(record, request.events)
  if not owns(record, request.fence) or not continues(record.last_seq, fresh) then
    return { "fenced", record.publication ~= request.publication }
  end
  end_with(job, record, request.state, ARGV[request.result], fresh)
  return { "committed", true }
end)
