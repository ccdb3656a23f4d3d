-- KEYS: three for each request (levels, live, tokens of the live).  ARGV: one JSON text.  Reply: a JSON array.

local input = cjson.decode(ARGV[1])
local outcomes = {}
for n, request in ipairs(input.requests) do
  local levels, live, sizes = KEYS[3 * n - 2], KEYS[3 * n - 1], KEYS[3 * n]
  local gone = redis.call("ZREM", live, request.id)
  if gone == 1 then
    local size = tonumber(redis.call("HGET", sizes, request.id) or 0)
    redis.call("HDEL", sizes, request.id)
    redis.call("HINCRBY", sizes, "sum", -size)
  end
  if request.tokens > 0 and redis.call("HEXISTS", levels, "tokens") == 1 then -- the next take cuts it to the burst
    redis.call("HINCRBYFLOAT", levels, "tokens", request.tokens)
  end
  outcomes[n] = gone
end
return cjson.encode(outcomes)
