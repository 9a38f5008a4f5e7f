-- Slots that wait for work are woken, and tickets call more of them.
-- Invariant: a node's own tickets + its slots that run one <= its slots, and shared tickets are only sent while all live
-- tickets + all slots that run one < capacity; so a lost message costs its lease and nothing else.
local LATE_MS = 1000      -- a ticket should have been taken by then; its node has other things to do

local function wake_slot(slot)
  local name = P .. K.wake .. slot
  redis.call('LPUSH', name, '1')
  redis.call('PEXPIRE', name, 10000)      -- a slot that dies before it looks leaves nothing
end

-- Wake up to n waiting slots of any node; returns how many were woken.
local function wake(n)
  if n <= 0 then return 0 end
  local idle = redis.call('ZPOPMAX', P .. K.idle, n)
  for i = 1, #idle, 2 do wake_slot(idle[i]) end
  return #idle / 2
end

local function idle_slots_of(node)
  local idle, slots = {}, slots_of(node)
  if #slots == 0 then return idle end
  for i, since in ipairs(redis.call('ZMSCORE', P .. K.idle, unpack(slots))) do
    if since then idle[#idle + 1] = slots[i] end
  end
  return idle
end

local function wake_node(node, n)
  local woken = 0
  for _, slot in ipairs(idle_slots_of(node)) do
    if woken == n then break end
    redis.call('ZREM', P .. K.idle, slot)
    wake_slot(slot)
    woken = woken + 1
  end
  return woken
end

local function active_slots() return redis.call('ZCOUNT', P .. K.slots, now(), '+inf') end

-- Reserve up to n tickets; `suffix` and what it is for make them a node's own. Appends Celery queue, id to `out`.
local function reserve(n, lease_ms, queue, suffix, out)
  local last = redis.call('HINCRBY', KEYS[1], M.ticket_ids, n)
  for number = last - n + 1, last do
    local id = string.format('%.0f', number) .. suffix
    redis.call('ZADD', P .. K.tickets, now() + lease_ms, id)
    if suffix ~= '' then redis.call('ZADD', P .. K.node_tickets .. string.sub(suffix, 2), now() + lease_ms, id) end
    out[#out + 1] = queue
    out[#out + 1] = id
  end
end

local function reserve_tickets(work, lease_ms, out)
  if work <= 0 then return end
  local meta = redis.call('HMGET', KEYS[1], M.capacity, M.queue)
  local free = tonumber(meta[1] or 0) - active_slots() - redis.call('ZCOUNT', P .. K.tickets, now(), '+inf')
  local n = math.min(free, work)
  if n > 0 then reserve(n, lease_ms, meta[2] or '', '', out) end
end

-- The Celery queue that one node alone takes tickets from, as `Keys.own_queue` names it.
local function own_queue(node) return 'celery-mem.' .. string.sub(P, 2, -3) .. '@' .. node end

-- Reserve tickets that only one node takes; returns how many. They go to a Celery queue of its own.
local function reserve_node_tickets(node, work, lease_ms, out)
  if work <= 0 or not takes_tasks(node) then return 0 end
  local sent = redis.call('ZCOUNT', P .. K.node_tickets .. node, now(), '+inf')
  local n = math.min(node_of(node).slots - redis.call('SCARD', P .. K.node_slots .. node) - sent, work)
  if n <= 0 then return 0 end
  reserve(n, lease_ms, own_queue(node), '@' .. node, out)
  return n
end

-- How long ago a ticket was reserved, in ms; nil if it was taken up already, or given up.
local function age_of_ticket(id, lease_ms)
  local deadline = redis.call('ZSCORE', P .. K.tickets, id)
  return deadline and math.max(0, now() + lease_ms - deadline)
end

local function take_up_ticket(id)
  redis.call('ZREM', P .. K.tickets, id)
  local node = string.match(id, '@(.*)$')
  if node then redis.call('ZREM', P .. K.node_tickets .. node, id) end
end

local function give_up_late_tickets(nodes)
  redis.call('ZREMRANGEBYSCORE', P .. K.tickets, '-inf', '(' .. now())
  for _, node in ipairs(nodes) do
    redis.call('ZREMRANGEBYSCORE', P .. K.node_tickets .. node, '-inf', '(' .. now())
  end
end

-- How long the last entry of a node's queue will wait there, in ms: by the pace of the node, but longer than nobody
-- there has taken anything by now, as what its slots run may be slower than what they ran.
local function wait_ms(node, length, lease_ms)
  if not takes_tasks(node) then return math.huge end
  local late = now() + lease_ms - LATE_MS
  if late > now() and redis.call('ZCOUNT', P .. K.node_tickets .. node, now(), late) > 0 then return math.huge end
  if #idle_slots_of(node) > 0 then return 0 end
  local found = node_of(node)
  return math.max(length / found.slots * found.pace, now() - found.took)
end

-- The entry of a node's queue that is cheapest to move, the last one of several: size class, member.
local function cheapest_entry(node)
  local letter, found
  for _, member in ipairs(redis.call('ZRANGE', home_queue(node), -32, -1)) do
    local class = string.sub(member, 17, 17)
    if not letter or class <= letter then letter, found = class, member end
  end
  return letter, found
end

-- The entry that another node may take, if to wait in the queue of its own costs more than to move it.
local function stealable(node, length, lease_ms)
  local letter, member = cheapest_entry(node)
  if member and wait_ms(node, length, lease_ms) > move_ms(letter) then return member end
  return nil
end

-- Call slots for n ready tasks of a node's queue: its own, then others if they may steal.
local function call_to_node(node, n, lease_ms, out)
  local left = n - wake_node(node, n)
  left = left - reserve_node_tickets(node, left, lease_ms, out)
  if left > 0 and stealable(node, redis.call('ZCARD', home_queue(node)), lease_ms) then
    reserve_tickets(left - wake(left), lease_ms, out)
  end
end

-- Call slots for n ready tasks of a constraint.
local function call_to_constraint(signature, n, nodes, lease_ms, out)
  for _, node in ipairs(nodes) do
    if n <= 0 then return end
    if takes_tasks(node) and admits(signature, node) and fits(signature, resources_of(node)) then
      n = n - wake_node(node, n)
      n = n - reserve_node_tickets(node, n, lease_ms, out)
    end
  end
end

-- Let slots be called also for what waits for this node already: all, or only tasks with needs.
local function add_waiting_here(node, only_needs)
  if redis.call('EXISTS', home_queue(node), P .. K.constraints) == 0 then return end
  if not only_needs then added_home[node] = redis.call('ZCARD', home_queue(node)) end
  for _, queue in ipairs(waiting_constraints()) do
    local signature = queue.signature
    if admits(signature, node) and (not only_needs or has_needs(signature)) then added_picky[signature] = queue.length end
  end
end

-- Call slots for what this call added to queues other than the shared one.
local function call_for_placed(lease_ms, out)
  for node, n in pairs(added_home) do
    n = math.min(n, redis.call('ZCARD', home_queue(node)))
    if n > 0 then call_to_node(node, n, lease_ms, out) end
  end
  if next(added_picky) then
    local nodes = all_nodes()
    for signature, n in pairs(added_picky) do
      n = math.min(n, redis.call('ZCARD', picky_queue(signature)))
      call_to_constraint(signature, n, nodes, lease_ms, out)
    end
  end
end

-- Call slots for what became ready, which is written; returns the tickets to send: {queue, id, queue, id, ...}.
local function call_slots(lease_ms)
  local out = {}
  if added_shared > 0 then reserve_tickets(redis.call('ZCARD', SHARED) - wake(added_shared), lease_ms, out) end
  call_for_placed(lease_ms, out)
  return out
end
