-- Final at once where nobody runs it; else the owner learns of it with its next renewal.
return each_job(function(job)
  local record = load_record(job, "state", "lease_until", "last_seq", "expires_at", "callback")

  if not record then return "missing" end
  if FINAL[record.state] then return "already_final" end
  if is_live(record) then
    change(record, { cancel_requested = true })
    save(job, record)
    return "requested"
  end
  cancel_now(job, record)
  return "cancelled"
end)
