-- KEYS: the open documents of one shard, for each request.  ARGV: one JSON text.
-- Reply: for each request an array of entries whose lease is over.

local clock = redis.call("TIME")
local now = string.format("%d", clock[1] * 1000000 + clock[2])
local input = cjson.decode(ARGV[1])
local outcomes = {}
for n, request in ipairs(input.requests) do
  outcomes[n] = redis.call("ZRANGEBYSCORE", KEYS[n], "-inf", now, "LIMIT", 0, request.limit)
end
return cjson.encode(outcomes)
