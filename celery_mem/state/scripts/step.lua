-- The one call of the slot loop: report what was done, take what is next.
-- LIB         record given notices nodes copies queue tickets settle lose take relief
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        5 slot            str
--             6 node            str
--             7 slot_lease      int   ms
--             8 ticket          str   ticket that this call takes up; empty later on
--             9 mode            str   letters: i it was idle, r this call repeats one whose reply was lost,
--                                     l leave if there is nothing to take, q leave in any case and take nothing,
--                                     p its node is paused: take nothing new, m it keeps large results on its
--                                     node: while that is not alive it takes nothing, as no report would count
--            10 want            int   most tasks to take
--            11 notice_limit    int   bytes of a value that a notice may carry
--            12 done            int   number of completions: key, attempt, nbytes, type, kind v|b|n, value or token of
--                                     the blob or of the copy on this node, contained keys joined by newlines
--            13 failed          int   number of failures: key, attempt, pickled error, 0|1 may be retried
--            14 back            int   number of tasks handed back: key, attempt
--            15 missing         int   number of tasks whose inputs were not there: key, attempt, number of copies
--                                     that were looked for in vain, dependency, token and place of each
--            16 pace            num   ms that a task takes on this node; empty where nothing is new
--            17 counts          str   what the slot counted, "name number name number ..."; empty mostly
--            18 lines           int   number of recordings that are to know what ran: id, the packed lines of it
--            19 ...             the completions, the failures, the tasks handed back, those without inputs, the lines
-- RETURNS     {taken, stale keys, tickets to send, age of the ticket that this call takes up in ms, -1 if it was given
--             up before, empty without one, ids of recordings that want lines of what was taken}, the last only if
--             there are any; taken is a list of {key, attempt, function hash, payload or nothing,
--             payload blob token or '', {dep, kind v|r|-, value or replicas, ...}}
-- ERRORS      none of its own: a late or repeated report is named in `stale` or passed over
-- INVARIANTS  a report counts only under the current attempt; a blob that vanished before its commit is not adopted,
--             nor is a copy on a node that is not alive: the task is ready again; what is taken has its inputs in
--             memory; a slot takes at most its fair share; tasks on one node never use more resources than it has; who is
--             told of a completion finds its line, in a stream that is bounded and never made here
-- COST        O(R log Q + E): R tasks reported or taken, Q ready ones, E edges of those
local slot, node, lease, ticket, mode = ARGV[5], ARGV[6], tonumber(ARGV[7]), ARGV[8], ARGV[9]
local want, notice_limit = tonumber(ARGV[10]), tonumber(ARGV[11])
local leaving = string.find(mode, 'q', 1, true)
relief()
local is_repeat, ticket_age = string.find(mode, 'r', 1, true), ''
if ticket ~= '' then
  ticket_age = age_of_ticket(ticket, ticket_lease) or (is_repeat and '' or -1)
  take_up_ticket(ticket)
end
if not is_repeat then
  for name, n in string.gmatch(ARGV[17], '(%S+) (%S+)') do redis.call('HINCRBY', P .. K.counts, name, n) end
end
if string.find(mode, 'i', 1, true) then redis.call('ZREM', P .. K.idle, slot) end
if ticket ~= '' or not redis.call('ZSCORE', P .. K.slots, slot) then
  -- It begins, or it was given up for dead and is back: from here on the node's heartbeats keep its lease.
  redis.call('SADD', P .. K.node_slots .. node, slot)
  redis.call('ZADD', P .. K.slots, now() + lease, slot)
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

-- A task with needs that ends makes room for others with needs.
local has_room = false
local function leave_slot(r)
  disown(slot, r.key)
  has_room = has_room or has_flag(r, L.constraint) and has_needs(signature_of(r))
end

-- Whether the copy that a completion brings is there to be recorded.
local function is_there(kind, token, key)
  if kind == 'b' then return has_blob(token, key) end
  return kind == 'v' or node_of(node)
end

local a = 19
for _ = 1, tonumber(ARGV[12]) do
  local key, kind, data = ARGV[a], ARGV[a + 4], ARGV[a + 5]
  local r = current(key, ARGV[a + 1])
  if r then
    leave_slot(r)
    if is_there(kind, data, key) then
      enter_memory(r, ARGV[a + 2], ARGV[a + 3], kind, data, ARGV[a + 6], slot, kind == 'n' and node or REDIS)
      notify_result(r, kind, data, notice_limit)
    else
      requeue(r)
      if kind == 'n' then stale[#stale + 1] = key end
    end
  elseif kind == 'b' then keep_again(load(key), data, REDIS) end
  a = a + 7
end
for _ = 1, tonumber(ARGV[13]) do
  local r = current(ARGV[a], ARGV[a + 1])
  if r then
    local retries = tonumber(extra(r, F.retries) or 0)
    if ARGV[a + 3] == '1' and retries > 0 then
      redis.call('HSET', r.name, F.retries, retries - 1)
      leave_slot(r)
      requeue(r)
    else
      leave_slot(r)
      redis.call('HSET', r.name, F.error, ARGV[a + 2])
      err(r, r.key)
    end
  end
  a = a + 4
end
for _ = 1, tonumber(ARGV[14]) do
  local r = current(ARGV[a], ARGV[a + 1])
  if r then
    leave_slot(r)
    requeue(r)
  end
  a = a + 2
end
for _ = 1, tonumber(ARGV[15]) do
  local key, attempt, n = ARGV[a], ARGV[a + 1], tonumber(ARGV[a + 2])
  for i = a + 3, a + 3 * n, 3 do lose_copy(ARGV[i], ARGV[i + 1], ARGV[i + 2]) end
  local r = current(key, attempt)
  if r then
    leave_slot(r)
    requeue(r)
  end
  a = a + 3 + 3 * n
end
for _ = 1, tonumber(ARGV[18]) do
  local most = #ARGV[a + 1] > 2048 and 500 or 2000      -- so that it never takes more than some 10 MB
  redis.call('XADD', P .. K.lines .. ARGV[a], 'NOMKSTREAM', 'MAXLEN', '~', most, '*', 'l', ARGV[a + 1])
  a = a + 2
end
if ARGV[16] ~= '' and node_of(node) then redis.call('HSET', P .. K.node .. node, N.pace, ARGV[16]) end
run_settle()
flush_records()
flush_copies()
flush_queues()

-- Take: first, on a repeat, what an earlier call gave; then what is next in the queues.
local taken, keys, again = {}, {}, {}
if is_repeat and want > 0 then
  for _, key in ipairs(redis.call('HKEYS', P .. K.slot .. slot)) do
    again[key] = true
    keys[#keys + 1] = key
  end
end
want = want - #keys
local takes = want > 0 and not leaving and not string.find(mode, 'p', 1, true)
  and (not string.find(mode, 'm', 1, true) or node_of(node))
if takes then
  local next_keys = take(node, want)
  if #next_keys == 0 and #keys == 0 then next_keys = steal(node, ticket_lease) end
  for _, key in ipairs(next_keys) do keys[#keys + 1] = key end
end
local function inputs_of(r, given_text)
  local given, n_given = read_given(given_text or '')
  local inputs, deps, next_dep = {}, deps_of(r), 1
  for place = 1, #deps + n_given do
    local key, kind, data
    local found = given[place]
    if found then key, kind, data = found.key, 'v', found.value
    else
      key = deps[next_dep]
      next_dep = next_dep + 1
      local v = redis.call('HMGET', P .. K.task .. key, F.value, F.replicas)
      if v[1] then kind, data = 'v', v[1]
      elseif v[2] then kind, data = 'r', v[2]
      else kind, data = '-', '' end
    end
    local n = #inputs
    inputs[n + 1], inputs[n + 2], inputs[n + 3] = key, kind, data
  end
  return inputs
end

local owned = {}
if #keys > 0 then
  local last = redis.call('HINCRBY', KEYS[1], M.attempts, #keys)
  for i, key in ipairs(keys) do
    local r, payload, given_text = load_with(key, F.payload, F.given)
    if r then      -- else Redis evicted it, and its client makes it again
      if not again[key] then
        r.state, r.attempt = 'processing', string.format('%.0f', last - #keys + i)
        redis.call('HSET', r.name, F.core, core_of(r), F.owner, slot)
        owned[#owned + 1], owned[#owned + 2] = key, r.attempt
      end
      local blob = has_flag(r, L.payload_blob) and extra(r, F.payload_blob)
      taken[#taken + 1] = {key, r.attempt, function_of(r), payload or '', blob or '', inputs_of(r, given_text)}
    end
  end
  for i = 1, #owned, 2000 do
    redis.call('HSET', P .. K.slot .. slot, unpack(owned, i, math.min(i + 1999, #owned)))
  end
  if #owned > 0 and node_of(node) then redis.call('HSET', P .. K.node .. node, N.took, now()) end
end
flush_notices()

local goes = leaving or (#keys == 0 and string.find(mode, 'l', 1, true))
if goes then
  redis.call('ZREM', P .. K.slots, slot)
  redis.call('ZREM', P .. K.idle, slot)
  redis.call('SREM', P .. K.node_slots .. node, slot)
  redis.call('UNLINK', P .. K.wake .. slot)
elseif #keys == 0 and takes then
  redis.call('ZADD', P .. K.idle, now(), slot)
end
local tickets = {}
if added_shared > #keys or goes then
  local left = redis.call('ZCARD', SHARED)
  if left > 0 then reserve_tickets(left - wake(math.min(left, added_shared)), ticket_lease, tickets) end
end
if goes then add_waiting_here(node) elseif has_room then add_waiting_here(node, true) end
call_for_placed(ticket_lease, tickets)
if #keys > 0 and redis.call('EXISTS', P .. K.recordings) == 1 then
  return {taken, stale, tickets, ticket_age, redis.call('ZRANGEBYSCORE', P .. K.recordings, now(), '+inf')}
end
return {taken, stale, tickets, ticket_age}
