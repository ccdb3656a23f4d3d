-- KEYS: four for each request, as in put.lua.  ARGV: one JSON text.  Reply: a JSON array: 1 where the chunk is gone.

local clock = redis.call("TIME")
local now = clock[1] * 1000000 + clock[2]
local input = cjson.decode(ARGV[1])
local outcomes = {}
for n, request in ipairs(input.requests) do
  local ends, sizes, data, holders = KEYS[4 * n - 3], KEYS[4 * n - 2], KEYS[4 * n - 1], KEYS[4 * n]
  redis.call("ZREM", holders, request.holder)
  redis.call("ZREMRANGEBYSCORE", holders, "-inf", string.format("%d", now))
  local last = redis.call("ZRANGE", holders, -1, -1, "WITHSCORES")[2]
  if last then
    redis.call("ZADD", ends, "XX", last, request.digest)
    redis.call("PEXPIREAT", data, string.format("%d", math.ceil(tonumber(last) / 1000)))
    outcomes[n] = 0
  else
    redis.call("DEL", data, holders)
    if redis.call("ZREM", ends, request.digest) == 1 then
      redis.call("HINCRBY", sizes, "sum", -tonumber(redis.call("HGET", sizes, request.digest) or 0))
      redis.call("HDEL", sizes, request.digest)
    end
    outcomes[n] = 1
  end
end
return cjson.encode(outcomes)
