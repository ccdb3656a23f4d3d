-- Of each shard, the jobs made last: id and time in turn, newest first.
-- KEYS: the `recent` index of each shard.  ARGV: how many of each.
local found = {}
for n, index in ipairs(KEYS) do
  found[n] = redis.call("ZRANGE", index, 0, ARGV[1] - 1, "REV", "WITHSCORES")
end
return cjson.encode(found)
