-- The one call of the slot loop: report what was done, take what is next.
-- LIB         record notices queue settle relief
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        5 slot            str
--             6 node            str
--             7 slot_lease      int   ms
--             8 ticket          str   ticket that this call takes up; empty later on
--             9 mode            str   letters: i it was idle, r this call repeats one whose reply was lost,
--                                     l leave if there is nothing to take, q leave in any case and take nothing
--            10 want            int   most tasks to take
--            11 notice_limit    int   bytes of a value that a notice may carry
--            12 done            int   number of completions: key, attempt, nbytes, type, kind v|b, value or blob token,
--                                     contained keys joined by newlines
--            13 failed          int   number of failures: key, attempt, pickled error, 0|1 may be retried
--            14 back            int   number of tasks handed back: key, attempt
--            15 ...             the completions, the failures, the tasks handed back
-- RETURNS     {taken, stale keys, tickets to send}; taken is a list of {key, attempt, function hash, payload or nothing,
--             payload blob token or '', {dep, kind v|b|-, value or blob token, ...}}
-- ERRORS      none of its own: a late or repeated report is named in `stale` or passed over
-- INVARIANTS  a report counts only under the current attempt; a blob that vanished before its commit is not adopted,
--             the task is ready again; what is taken has its inputs in memory; a slot takes at most its fair share
-- COST        O(R log Q + E): R tasks reported or taken, Q ready ones, E edges of those
local slot, node, lease, ticket, mode = ARGV[5], ARGV[6], tonumber(ARGV[7]), ARGV[8], ARGV[9]
local want, notice_limit = tonumber(ARGV[10]), tonumber(ARGV[11])
local leaving = string.find(mode, 'q', 1, true)
relief()
if ticket ~= '' then redis.call('ZREM', P .. K.tickets, ticket) end
if string.find(mode, 'i', 1, true) then redis.call('ZREM', P .. K.idle, slot) end
if ticket ~= '' or not redis.call('ZSCORE', P .. K.slots, slot) then
  -- It begins, or it was given up for dead and is back: from here on the node's heartbeats keep its lease.
  redis.call('SADD', P .. K.node_slots .. node, slot)
  redis.call('ZADD', P .. K.slots, now + lease, slot)
end

local stale = {}
local function current(key, attempt)
  local r = load(key)
  if r and r.state == 'processing' and r.attempt == attempt then return r end
  if not (r and r.state == 'memory' and r.attempt == attempt) then    -- else a repeat of what was applied
    stale[#stale + 1] = key
  end
  return nil
end

local a = 15
for _ = 1, tonumber(ARGV[12]) do
  local key, kind, data = ARGV[a], ARGV[a + 4], ARGV[a + 5]
  local r = current(key, ARGV[a + 1])
  if r then
    disown(slot, key)
    if kind == 'b' and redis.call('EXISTS', P .. K.blob .. data .. ':' .. key) == 0 then enqueue(r)
    else
      enter_memory(r, ARGV[a + 2], ARGV[a + 3], kind, data, ARGV[a + 6])
      notify_result(r, kind, data, notice_limit)
    end
  elseif kind == 'b' then keep_again(load(key), F.blob, data) end
  a = a + 7
end
for _ = 1, tonumber(ARGV[13]) do
  local r = current(ARGV[a], ARGV[a + 1])
  if r then
    local retries = tonumber(extra(r, F.retries) or 0)
    if ARGV[a + 3] == '1' and retries > 0 then
      redis.call('HSET', r.name, F.retries, retries - 1)
      disown(slot, r.key)
      enqueue(r)
    else
      redis.call('HSET', r.name, F.error, ARGV[a + 2])
      err(r, r.key)
    end
  end
  a = a + 4
end
for _ = 1, tonumber(ARGV[14]) do
  local r = current(ARGV[a], ARGV[a + 1])
  if r then
    disown(slot, r.key)
    enqueue(r)
  end
  a = a + 2
end
run_settle()
flush_records()
local added = flush_queue()

-- Take: first, on a repeat, what an earlier call gave; then the head of the queue.
local taken, keys, again = {}, {}, {}
if string.find(mode, 'r', 1, true) and want > 0 then
  for _, key in ipairs(redis.call('HKEYS', P .. K.slot .. slot)) do
    again[key] = true
    keys[#keys + 1] = key
  end
end
if want > 1 then
  local share = math.ceil(redis.call('ZCARD', P .. K.ready) / math.max(1, active_slots()))
  want = math.min(want, math.max(1, share))
end
want = want - #keys
if want > 0 and not leaving then
  local head_of_queue = redis.call('ZPOPMIN', P .. K.ready, want)
  for i = 1, #head_of_queue, 2 do keys[#keys + 1] = string.sub(head_of_queue[i], 17) end
end
local owned = {}
if #keys > 0 then
  local last = redis.call('HINCRBY', KEYS[1], M.attempts, #keys)
  for i, key in ipairs(keys) do
    local r, payload, payload_blob = load(key, true)
    if not again[key] then
      r.state, r.attempt = 'processing', string.format('%.0f', last - #keys + i)
      redis.call('HSET', r.name, F.state, 'processing', F.attempt, r.attempt, F.owner, slot)
      owned[#owned + 1], owned[#owned + 2] = key, r.attempt
    end
    local inputs, n = {}, 0
    for _, dep in ipairs(deps_of(r)) do
      local value = redis.call('HMGET', P .. K.task .. dep, F.value, F.blob)
      inputs[n + 1] = dep
      if value[1] then inputs[n + 2], inputs[n + 3] = 'v', value[1]
      elseif value[2] then inputs[n + 2], inputs[n + 3] = 'b', value[2]
      else inputs[n + 2], inputs[n + 3] = '-', '' end
      n = n + 3
    end
    taken[i] = {key, r.attempt, r.fn, payload or '', payload_blob or '', inputs}
  end
  for i = 1, #owned, 2000 do
    redis.call('HSET', P .. K.slot .. slot, unpack(owned, i, math.min(i + 1999, #owned)))
  end
end
flush_notices()

local goes = leaving or (#keys == 0 and string.find(mode, 'l', 1, true))
if goes then
  redis.call('ZREM', P .. K.slots, slot)
  redis.call('ZREM', P .. K.idle, slot)
  redis.call('SREM', P .. K.node_slots .. node, slot)
  redis.call('UNLINK', P .. K.wake .. slot)
elseif #keys == 0 and want > 0 then
  redis.call('ZADD', P .. K.idle, now, slot)
end
local tickets = {}
if added > #keys or goes then
  local left = redis.call('ZCARD', P .. K.ready)
  if left > 0 then tickets = reserve_tickets(left - wake(math.min(left, added)), ticket_lease) end
end
return {taken, stale, tickets}
