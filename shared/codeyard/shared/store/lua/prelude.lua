-- Put in front of every other script at load: the clock, the request, the record, and the helpers that
-- store/transitions.py keeps at its end. That file is the specification; each script here is one
-- function of it, in the same order of questions.
--
-- KEYS: five for each job (record, events, due, recent, callbacks).  ARGV: one JSON text, the protocol's numbers and
-- the jobs' requests; then the long texts, which a request names by their place in ARGV.  Reply: one JSON text, an array with one outcome for each job. Numbers with a
-- fraction leave as text, because cjson and tostring keep only 14 digits.

local clock = redis.call("TIME")
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000

local input = cjson.decode(ARGV[1])
local timing = input.timing

local function each_job(transition)
  local outcomes = {}
  for n, request in ipairs(input.requests) do
    local k = 5 * (n - 1)
    local job = {
      record = KEYS[k + 1], events = KEYS[k + 2], due = KEYS[k + 3], recent = KEYS[k + 4], callbacks = KEYS[k + 5],
      id = request.id,
    }
    outcomes[n] = transition(job, request)
  end
  return cjson.encode(outcomes)
end

-- The record ----------------------------------------------------------------------------------------

local KIND = {
  id = "text", state = "text", job = "text", digest = "text", incarnation = "text", publication = "text",
  fence = "text", counter = "whole", owner = "text", lease_until = "time", attempt = "whole", crashes = "whole",
  alone = "flag", alone_crashes = "whole", cancel_requested = "flag", created_at = "time", queued_at = "time",
  started_at = "time", finished_at = "time", deadline_at = "time", check_at = "time", expires_at = "time",
  last_seq = "whole", result = "text", history = "text", callback = "text",
  callback_at = "time", callback_attempts = "whole",
}
local ALL = {
  "id", "state", "job", "digest", "incarnation", "publication", "fence", "counter", "owner", "lease_until", "attempt",
  "crashes", "alone", "alone_crashes", "cancel_requested", "created_at", "queued_at", "started_at", "finished_at",
  "deadline_at", "check_at", "expires_at", "last_seq", "result", "history",
  "callback", "callback_at", "callback_attempts",
}
-- Only records of jobs with a callback have these.
local ABSENT = { callback = "", callback_at = 0, callback_attempts = 0 }
local FINAL = { succeeded = true, failed = true, cancelled = true, expired = true }

local function decimal(seconds)
  return string.format("%.6f", seconds) -- the clock's own resolution; a double holds it until the year 2242
end

local function encode(kind, value)
  if kind == "time" then return value == 0 and "0" or decimal(value) end
  if kind == "flag" then return value and "1" or "0" end
  return value -- Redis writes whole numbers without a fraction
end

-- Asking a record for a field that was not loaded is a bug; nil would compare as "another one".
local STRICT = {
  __index = function(_, name)
    error("field " .. name .. " was not loaded")
  end,
}

-- The fields named, decoded; nil if there is no record. `state` comes first: every record has one.
local function load_record(job, ...)
  local values = redis.call("HMGET", job.record, ...)
  if not values[1] then return nil end
  local record = { changed = {}, is_new = false }
  for n = 1, #values do
    local name = select(n, ...)
    local kind, text = KIND[name], values[n]
    if not text and ABSENT[name] then
      record[name] = ABSENT[name]
    elseif kind == "text" then
      record[name] = text
    elseif kind == "flag" then
      record[name] = text == "1"
    else
      record[name] = tonumber(text)
    end
  end
  return setmetatable(record, STRICT)
end

local function load_long(job, name)
  return redis.call("HGET", job.record, name)
end

-- All fields as they are stored, in the order of `ALL`; false if there is no record.
local function load_stored(job)
  local values = redis.call("HMGET", job.record, unpack(ALL))
  return values[1] and values
end

local function change(record, fields)
  for name, value in pairs(fields) do
    record[name] = value
    record.changed[name] = true
  end
end

-- A record that `save` will write whole, in place of whatever was there.
local function new_record(job, fields)
  local record = { changed = {}, is_new = true }
  change(record, {
    id = job.id, fence = "", counter = 0, owner = "", lease_until = 0, attempt = 0, crashes = 0, alone = false,
    alone_crashes = 0, cancel_requested = false, queued_at = 0, started_at = 0, finished_at = 0, check_at = 0,
    last_seq = 0, result = "", history = "", callback = "", callback_at = 0, callback_attempts = 0,
  })
  change(record, fields)
  return setmetatable(record, STRICT)
end

-- Indexes are scored in whole microseconds: a short sorted set compares them without parsing text.
local function microseconds(seconds)
  return math.ceil(seconds * 1000000)
end

local function expire_with(record, key)
  redis.call("PEXPIREAT", key, math.ceil(record.expires_at * 1000))
end

local function index_new(job, record)
  redis.call("ZADD", job.recent, microseconds(record.created_at), job.id)
  redis.call("ZREMRANGEBYRANK", job.recent, 0, -timing.num_recent - 1)
end

-- Append to the stream and wake who watches the job, on the channel that ends in `wake`, not `record`. Entry ids are `<seq>-0`, so Redis itself refuses
-- a repeated or lower one.
local function write_events(job, record, events)
  for _, event in ipairs(events) do
    redis.call("XADD", job.events, string.format("%d-0", event.seq), "event", event.text or ARGV[event.body])
  end
  expire_with(record, job.events)
  redis.call("PUBLISH", string.sub(job.record, 1, -7) .. "wake", events[#events].seq)
end

local function save(job, record, events)
  if record.is_new then redis.call("DEL", job.record, job.events) end
  local fields = {}
  for name in pairs(record.changed) do
    if not record.is_new or record[name] ~= ABSENT[name] then
      fields[#fields + 1] = name
      fields[#fields + 1] = encode(KIND[name], record[name])
    end
  end
  redis.call("HSET", job.record, unpack(fields))
  if record.is_new then
    expire_with(record, job.record)
    index_new(job, record)
  end
  if record.changed.check_at then
    if record.check_at > 0 then
      redis.call("ZADD", job.due, microseconds(record.check_at), job.id)
    else
      redis.call("ZREM", job.due, job.id)
    end
  end
  if record.changed.callback_at then
    if record.callback_at > 0 then
      redis.call("ZADD", job.callbacks, microseconds(record.callback_at), job.id)
    elseif not record.is_new then
      redis.call("ZREM", job.callbacks, job.id)
    end
  end
  if events and #events > 0 then write_events(job, record, events) end
end

-- Helpers, as at the end of transitions.py ----------------------------------------------------------

local function is_live(record)
  return record.state == "running" and record.lease_until > now
end

local function owns(record, fence)
  return record.state == "running" and record.fence == fence
end

local function was_never_accepted(job, record)
  if record.state ~= "expired" then return false end
  local failure = cjson.decode(load_long(job, "result")).error
  return type(failure) == "table" and failure.code == timing.never_published
end

local function fresh_of(record, events)
  local fresh = {}
  for _, event in ipairs(events) do
    if event.seq > record.last_seq then fresh[#fresh + 1] = event end
  end
  return fresh
end

-- Redriven, and its publish not known to be confirmed.
local function is_unpublished(record)
  return record.state == "queued" and record.queued_at == 0
end

local function continues(last_seq, events)
  for n, event in ipairs(events) do
    if event.seq ~= last_seq + n then return false end
  end
  return true
end

-- Its lease ended without release: the job may be what killed the owner.
local function drop_lost_owner(record)
  change(record, {
    owner = "",
    lease_until = 0,
    crashes = record.crashes + 1,
    alone_crashes = record.alone_crashes + (record.alone and 1 or 0),
    alone = false,
  })
end

local function end_with(job, record, state, result, tail)
  local last = record.last_seq + #tail + 1
  tail[#tail + 1] = { seq = last, text = string.format('{"seq":%d,"kind":"end","state":"%s"}', last, state) }
  change(record, {
    state = state, result = result, owner = "", lease_until = 0, finished_at = now, check_at = 0, last_seq = last,
  })
  if record.callback == "waiting" then change(record, { callback = "due", callback_at = now }) end
  save(job, record, tail)
end

-- The store's own results; `code` and `message` hold nothing that JSON would escape.
local function end_as(job, record, state, code, message)
  local result = string.format(
    '{"v":1,"state":"%s","text":"","tool_calls":[],"logprobs":[],"usage":{"prompt_tokens":0,"completion_tokens":0},'
      .. '"error":{"code":"%s","message":"%s"}}',
    state, code, message
  )
  end_with(job, record, state, result, {})
end

local function cancel_now(job, record)
  end_as(job, record, "cancelled", "cancelled", "cancelled on request")
end

local function expire_now(job, record)
  local timeout_s = cjson.decode(load_long(job, "job")).timeout_s
  end_as(job, record, "expired", "deadline_exceeded", string.format("not finished within its %g s", timeout_s))
end
