-- KEYS: ends and sizes of one tenant.  ARGV: one JSON text.  Reply: a JSON array with the bytes that have not ended.

local clock = redis.call("TIME")
local over = redis.call("ZRANGEBYSCORE", KEYS[1], "-inf", string.format("%d", clock[1] * 1000000 + clock[2]))
local sum = tonumber(redis.call("HGET", KEYS[2], "sum") or 0)
for _, digest in ipairs(over) do sum = sum - tonumber(redis.call("HGET", KEYS[2], digest) or 0) end
return cjson.encode({ sum })
