-- One call that changes a document. documents/redis.py says what the keys hold.
-- KEYS: three for each request (document, ids, open).  ARGV: one JSON text.
-- Reply: a JSON array, for each request [done, now, body, wish]; without a document [false, now].

local clock = redis.call("TIME")
local now = clock[1] * 1000000 + clock[2]
local input = cjson.decode(ARGV[1])

local function extend(key, ms)
  if redis.call("PTTL", key) == -1 then redis.call("PEXPIRE", key, ms) else redis.call("PEXPIRE", key, ms, "GT") end
end

local function create(request, document, ids, open)
  local there = redis.call("HGET", document, "first")
  if there then return there == request.body end
  local ms = math.ceil(request.ttl_s * 1000)
  redis.call("HSET", document, "body", request.body, "first", request.body, "wish", "", "owner", "")
  redis.call("PEXPIRE", document, ms)
  -- Ids of documents that have ended leave with those that come: the oldest first, as they sort by time.
  local prefix = string.sub(document, 1, -#request.id - 1)
  for _, id in ipairs(redis.call("ZRANGE", ids, 0, 9)) do
    if redis.call("EXISTS", prefix .. id) == 0 then redis.call("ZREM", ids, id) end
  end
  redis.call("ZADD", ids, 0, request.id)
  extend(ids, ms)
  if request.open then
    redis.call("ZADD", open, 0, request.entry)
    extend(open, ms)
  end
  return true
end

local function lease(request, document, open)
  redis.call("HSET", document, "owner", request.owner)
  redis.call("ZADD", open, string.format("%d", math.floor(now + request.lease_s * 1000000)), request.entry)
end

local function take(request, document, open)
  local until_us = tonumber(redis.call("ZSCORE", open, request.entry) or nil)
  if redis.call("EXISTS", document) == 0 then
    redis.call("ZREM", open, request.entry)
    return false
  end
  if not until_us then return false end
  if until_us > now and redis.call("HGET", document, "owner") ~= request.owner then return false end
  lease(request, document, open)
  return true
end

local function write(request, document, open)
  if redis.call("EXISTS", document) == 0 or redis.call("HGET", document, "owner") ~= request.owner then return false end
  if not redis.call("ZSCORE", open, request.entry) then -- closed: a repeat of the write that did it
    return request.lease_s == nil and redis.call("HGET", document, "body") == request.body
  end
  redis.call("HSET", document, "body", request.body)
  if request.lease_s then lease(request, document, open) else redis.call("ZREM", open, request.entry) end
  return true
end

local outcomes = {}
for n, request in ipairs(input.requests) do
  local document, ids, open = KEYS[3 * n - 2], KEYS[3 * n - 1], KEYS[3 * n]
  local done = false
  if request.act == "create" then done = create(request, document, ids, open)
  elseif request.act == "take" then done = take(request, document, open)
  elseif request.act == "write" then done = write(request, document, open)
  elseif request.act == "wish" and redis.call("EXISTS", document) == 1 then
    redis.call("HSET", document, "wish", request.wish)
    done = true
  elseif request.act == "delete" then
    redis.call("ZREM", ids, request.id)
    redis.call("ZREM", open, request.entry)
    done = redis.call("DEL", document) == 1
  end
  local stored = redis.call("HMGET", document, "body", "wish")
  outcomes[n] = { done, string.format("%d", now), stored[1] or false, stored[2] or "" }
end
return cjson.encode(outcomes)
