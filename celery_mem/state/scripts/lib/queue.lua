-- The ready queue, the slots that wait for it, and the tickets that call more of them.
local readied, unreadied = {}, {}

local function enqueue(r)
  r.waiting = 0
  set_state(r, 'ready')
  readied[r.key] = r
  unreadied[r.key] = nil
end

local function dequeue(r)
  readied[r.key] = nil
  unreadied[r.key] = r      -- also if this call put it there: it may have been in the queue before
end

local function flush_queue()
  local added, args, n = 0, {}, 0
  for key, r in pairs(unreadied) do redis.call('ZREM', P .. K.ready, r.rank .. key) end
  for key, r in pairs(readied) do
    args[n + 1], args[n + 2] = r.priority and -tonumber(r.priority) or 0, r.rank .. key
    n = n + 2
    added = added + 1
    if n == 2000 then
      redis.call('ZADD', P .. K.ready, unpack(args))
      args, n = {}, 0
    end
  end
  if n > 0 then redis.call('ZADD', P .. K.ready, unpack(args)) end
  readied, unreadied = {}, {}
  return added
end

-- Wake up to n waiting slots; returns how many were woken.
local function wake(n)
  if n <= 0 then return 0 end
  local idle = redis.call('ZPOPMAX', P .. K.idle, n)
  for i = 1, #idle, 2 do
    local name = P .. K.wake .. idle[i]
    redis.call('LPUSH', name, '1')
    redis.call('PEXPIRE', name, 10000)      -- a slot that dies before it looks leaves nothing
  end
  return #idle / 2
end

local function active_slots() return redis.call('ZCOUNT', P .. K.slots, now, '+inf') end

-- Reserve tickets for ready work that no slot is about to take: {queue, id, id, ...}, empty if none is due.
-- Invariant: live tickets + active slots <= capacity, so a lost message costs its lease and nothing else.
local function reserve_tickets(work, lease_ms)
  if work <= 0 then return {} end
  local meta = redis.call('HMGET', KEYS[1], M.capacity, M.queue)
  local free = tonumber(meta[1] or 0) - active_slots() - redis.call('ZCOUNT', P .. K.tickets, now, '+inf')
  local n = math.min(free, work)
  if n <= 0 then return {} end
  local last, out = redis.call('HINCRBY', KEYS[1], M.ticket_ids, n), {meta[2] or ''}
  for id = last - n + 1, last do
    redis.call('ZADD', P .. K.tickets, now + lease_ms, id)
    out[#out + 1] = tostring(id)
  end
  return out
end

-- Write the queue, wake slots for what became ready, and return the tickets to send.
local function call_slots(lease_ms)
  local added = flush_queue()
  if added == 0 then return {} end
  return reserve_tickets(redis.call('ZCARD', P .. K.ready) - wake(added), lease_ms)
end
