-- The state of each record; false where there is none.
return each_job(function(job)
  return redis.call("HGET", job.record, "state")
end)
