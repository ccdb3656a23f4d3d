-- KEYS: the tenant's live jobs.  ARGV: one JSON text.  Reply: one JSON array of ids. Those past their end are left out.

local clock = redis.call("TIME")
local input = cjson.decode(ARGV[1])
local outcomes = {}
for n, request in ipairs(input.requests) do
  local now = clock[1] * 1000000 + clock[2]
  local from = "(" .. string.format("%d", now)
  outcomes[n] = redis.call("ZRANGEBYSCORE", KEYS[n], from, "+inf", "LIMIT", request.start, request.count)
end
return cjson.encode(outcomes)
