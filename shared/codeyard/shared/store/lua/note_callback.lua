-- What arrived has arrived, whoever says so. Otherwise the newest delivery has the word.
return each_job(function(job, request)
  local record = load_record(job, "state", "incarnation", "callback", "callback_at", "callback_attempts")

  if not record or record.incarnation ~= request.incarnation then return false end
  if record.callback ~= "due" then return record.callback == request.outcome end
  if request.outcome ~= "delivered" and record.callback_attempts ~= request.attempt then return false end
  if request.outcome == "again" then
    change(record, { callback_at = now + request.delay_s })
  else
    change(record, { callback = request.outcome, callback_at = 0 })
  end
  save(job, record)
  return true
end)
