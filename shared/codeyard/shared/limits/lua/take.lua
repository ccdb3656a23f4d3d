-- A port of limits/rules.py: the same questions in the same order. limits/redis.py says what the keys hold.
--
-- KEYS: three for each request (levels, live, tokens of the live).  ARGV: one JSON text.  Reply: one JSON text,
-- an array for each request; numbers with a fraction leave as text, because cjson keeps only 14 digits.

local clock = redis.call("TIME")
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
local input = cjson.decode(ARGV[1])

local function exact(number)
  return string.format("%.17g", number)
end

-- What the bucket {per_s, burst} holds now. A clock that went back fills nothing.
local function held(bucket, amount, at)
  if not bucket then return 0 end
  if not amount then return bucket[2] end
  return math.min(bucket[2], tonumber(amount) + math.max(0, now - tonumber(at)) * bucket[1])
end

-- Until it holds `wanted`, in seconds.
local function wait_s(bucket, has, wanted)
  return bucket and math.max(0, (wanted - has) / bucket[1]) or 0
end

local function full_s(bucket, has)
  return bucket and wait_s(bucket, has, bucket[2]) or 0
end

-- Take out of the live jobs those past their end; the sum changes with the set, in this script or not at all.
local function sweep(live, sizes)
  while true do
    local over = redis.call("ZRANGEBYSCORE", live, "-inf", math.floor(now * 1000000), "LIMIT", 0, 1000)
    if #over == 0 then return end
    local sum = 0
    for _, size in ipairs(redis.call("HMGET", sizes, unpack(over))) do sum = sum + (tonumber(size) or 0) end
    redis.call("ZREM", live, unpack(over))
    redis.call("HDEL", sizes, unpack(over))
    redis.call("HINCRBY", sizes, "sum", -sum)
  end
end

local function add(live, sizes, request)
  redis.call("ZADD", live, math.ceil((now + request.live_s) * 1000000), request.id)
  redis.call("HSET", sizes, request.id, request.tokens)
  redis.call("HINCRBY", sizes, "sum", request.tokens)
  local last = tonumber(redis.call("ZRANGE", live, -1, -1, "WITHSCORES")[2])
  redis.call("PEXPIREAT", live, math.ceil(last / 1000) + 1000)
  redis.call("PEXPIREAT", sizes, math.ceil(last / 1000) + 1000)
end

local outcomes = {}
for n, request in ipairs(input.requests) do
  local levels, live, sizes = KEYS[3 * n - 2], KEYS[3 * n - 1], KEYS[3 * n]
  local stored = redis.call("HMGET", levels, "requests", "requests_at", "tokens", "tokens_at")
  local has_requests = held(request.per_request, stored[1], stored[2])
  local has_tokens = held(request.per_token, stored[3], stored[4])
  local counts_live = request.most_jobs or request.most_tokens
  local mine, num_jobs, enqueued = false, 0, 0
  if counts_live then
    sweep(live, sizes)
    mine = redis.call("ZSCORE", live, request.id) and true
    num_jobs = redis.call("ZCARD", live)
    enqueued = tonumber(redis.call("HGET", sizes, "sum") or 0)
  end

  local charge = mine and 0 or request.tokens
  local wait = math.max(wait_s(request.per_request, has_requests, 1), wait_s(request.per_token, has_tokens, charge))
  local verdict = "granted"
  if request.per_request and has_requests < 1 then
    verdict = "requests"
  elseif request.per_token and has_tokens < charge then
    verdict = "tokens"
  elseif not mine and request.most_jobs and num_jobs >= request.most_jobs then
    verdict = "jobs"
  elseif not mine and request.most_tokens and enqueued + request.tokens > request.most_tokens then
    verdict = "enqueued"
  end

  local granted = verdict == "granted"
  local added = granted and counts_live and not mine
  if granted then
    if request.per_request then
      has_requests = has_requests - 1
      redis.call("HSET", levels, "requests", exact(has_requests), "requests_at", exact(now))
    end
    if request.per_token then
      has_tokens = has_tokens - charge
      redis.call("HSET", levels, "tokens", exact(has_tokens), "tokens_at", exact(now))
    end
    if request.per_request or request.per_token then -- a full bucket is the same as none
      local full = math.max(full_s(request.per_request, has_requests), full_s(request.per_token, has_tokens))
      redis.call("PEXPIRE", levels, math.ceil(full * 1000) + 1000)
    end
    if added then add(live, sizes, request) end
  end
  outcomes[n] = {
    verdict, granted and request.per_token and charge or 0, added and true or false, exact(wait),
    exact(has_requests), exact(full_s(request.per_request, has_requests)),
    exact(has_tokens), exact(full_s(request.per_token, has_tokens)),
  }
end
return cjson.encode(outcomes)
