-- First one wins. Refused for its fence, the delivery may go only if nobody counts on it.
return each_job(function(job)
  local fence, publication, state, result, events = take(), take(), take(), take(), take_events()
  local record = load_record(job, "state", "fence", "publication", "last_seq", "expires_at")

  if not record then return { "fenced", false } end
  if FINAL[record.state] then
    local mine = record.fence == fence and load_long(job, "result") == result
    return { mine and "committed" or "already_final", true }
  end
  local fresh = fresh_of(record, events)
  if not owns(record, fence) or not continues(record.last_seq, fresh) then
    return { "fenced", record.publication ~= publication }
  end
  end_with(job, record, state, result, fresh)
  return { "committed", true }
end)
