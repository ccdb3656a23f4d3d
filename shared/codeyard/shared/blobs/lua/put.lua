-- KEYS: four for each request (ends, sizes, data, holders; blobs/redis.py says what they hold).
-- ARGV: one JSON text, then the bytes that requests name by their place.  Reply: a JSON array of verdicts.
-- A request without `data` only holds: "present", or "missing".

local clock = redis.call("TIME")
local now = clock[1] * 1000000 + clock[2]
local input = cjson.decode(ARGV[1])

-- Take out of the sums what has ended: data keys end by themselves.
local function sweep(ends, sizes)
  while true do
    local over = redis.call("ZRANGEBYSCORE", ends, "-inf", string.format("%d", now), "LIMIT", 0, 1000)
    if #over == 0 then return end
    local sum = 0
    for _, size in ipairs(redis.call("HMGET", sizes, unpack(over))) do sum = sum + (tonumber(size) or 0) end
    redis.call("ZREM", ends, unpack(over))
    redis.call("HDEL", sizes, unpack(over))
    redis.call("HINCRBY", sizes, "sum", -sum)
  end
end

local function hold(request, ends, sizes, data, holders)
  local wanted = string.format("%d", math.ceil(now + request.ttl_s * 1000000))
  redis.call("ZREMRANGEBYSCORE", holders, "-inf", string.format("%d", now))
  redis.call("ZADD", holders, "GT", wanted, request.holder)
  local last = tonumber(redis.call("ZRANGE", holders, -1, -1, "WITHSCORES")[2])
  redis.call("ZADD", ends, string.format("%d", last), request.digest)
  redis.call("PEXPIREAT", data, string.format("%d", math.ceil(last / 1000)))
  redis.call("PEXPIREAT", holders, string.format("%d", math.ceil(last / 1000)))
  local end_of_all = tonumber(redis.call("ZRANGE", ends, -1, -1, "WITHSCORES")[2])
  redis.call("PEXPIREAT", ends, string.format("%d", math.ceil(end_of_all / 1000) + 1000))
  redis.call("PEXPIREAT", sizes, string.format("%d", math.ceil(end_of_all / 1000) + 1000))
end

local outcomes = {}
for n, request in ipairs(input.requests) do
  local ends, sizes, data, holders = KEYS[4 * n - 3], KEYS[4 * n - 2], KEYS[4 * n - 1], KEYS[4 * n]
  sweep(ends, sizes)
  local verdict = "missing"
  if redis.call("EXISTS", data) == 1 and redis.call("ZSCORE", ends, request.digest) then
    verdict = "present"
  elseif request.data then
    local bytes = ARGV[request.data]
    local lost = tonumber(redis.call("HGET", sizes, request.digest) or 0) -- still counted, and not there any more
    local more = #bytes - lost
    if tonumber(redis.call("HGET", sizes, "sum") or 0) + more > request.quota then
      verdict = "over_quota"
    else
      verdict = "stored"
      redis.call("SET", data, bytes)
      redis.call("DEL", holders)
      redis.call("HSET", sizes, request.digest, #bytes)
      redis.call("HINCRBY", sizes, "sum", more)
    end
  end
  if verdict == "present" or verdict == "stored" then hold(request, ends, sizes, data, holders) end
  outcomes[n] = verdict
end
return cjson.encode(outcomes)
