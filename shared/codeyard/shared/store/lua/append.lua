-- Events join the stream under the fence; those already there are skipped, a gap is refused.
return each_job(function(job, request)
  local record = load_record(job, "state", "fence", "last_seq", "expires_at")

  if not record or not owns(record, request.fence) then return "fenced" end
  local fresh = fresh_of(record, request.events)
  if #fresh == 0 then return "appended" end
  if not continues(record.last_seq, fresh) then return "fenced" end
  change(record, { last_seq = fresh[#fresh].seq })
  save(job, record, fresh)
  return "appended"
end)
