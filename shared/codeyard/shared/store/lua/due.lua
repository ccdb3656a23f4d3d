-- Of each shard, the first jobs whose check has come: id and time in turn, oldest first.
-- KEYS: the `due` index of each shard.  ARGV: a JSON text with `limit`, how many of each.
local clock = redis.call("TIME")
local now = string.format("%.0f", clock[1] * 1000000 + clock[2])
local limit = cjson.decode(ARGV[1]).limit
local found = {}
for n, index in ipairs(KEYS) do
  found[n] = redis.call("ZRANGE", index, "-inf", now, "BYSCORE", "LIMIT", 0, limit, "WITHSCORES")
end
return cjson.encode(found)
