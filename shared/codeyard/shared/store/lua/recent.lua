-- Of each shard, the jobs made last: id and time in turn, newest first.
-- KEYS: the `recent` index of each shard.  ARGV: a JSON text with `limit`, how many of each.
local limit = cjson.decode(ARGV[1]).limit
local found = {}
for n, index in ipairs(KEYS) do
  found[n] = redis.call("ZRANGE", index, 0, limit - 1, "REV", "WITHSCORES")
end
return cjson.encode(found)
