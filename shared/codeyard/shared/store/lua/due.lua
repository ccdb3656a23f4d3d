-- Of each shard, the first jobs whose check has come: id and time in turn, oldest first.
-- KEYS: the `due` index of each shard.  ARGV: how many of each.
local clock = redis.call("TIME")
local found = {}
for n, index in ipairs(KEYS) do
  local now = string.format("%s.%06d", clock[1], clock[2])
  found[n] = redis.call("ZRANGE", index, "-inf", now, "BYSCORE", "LIMIT", 0, ARGV[1], "WITHSCORES")
end
return cjson.encode(found)
