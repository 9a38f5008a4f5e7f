-- What a slot takes next: the best of its node's queue, of constraints that its node meets and of the shared queue, by
-- user priority; at equal priority the shared one comes last, and what the slot's own report made ready at its node
-- comes first, as its inputs are still at hand. If there is nothing, it steals.
local function fair_share(length, slots) return math.max(1, math.ceil(length / math.max(1, slots))) end

-- Add the first n entries of a queue to `found`; a key begins at the place `start` of a member.
local function add_head(found, queue, n, class, start, fresh)
  local head = redis.call('ZRANGE', queue, 0, n - 1, 'WITHSCORES')
  for i = 1, #head, 2 do
    local member = head[i]
    if not (fresh and fresh[member]) then
      found[#found + 1] = {score = tonumber(head[i + 1]), class = class, member = member, queue = queue, start = start}
    end
  end
end

local function is_before(a, b)
  if a.score ~= b.score then return a.score < b.score end
  if a.class ~= b.class then return a.class < b.class end
  return a.member < b.member
end

local function add_fresh(found, queue, fresh)
  for member in pairs(fresh) do
    local score = redis.call('ZSCORE', queue, member)
    found[#found + 1] = {score = tonumber(score), class = 0, member = member, queue = queue, start = 18}
  end
end

-- Add the heads of the queues of constraints that the node meets with what it has free.
local function add_picky(found, node)
  local free
  for _, queue in ipairs(waiting_constraints()) do
    local signature = queue.signature
    local needs = has_needs(signature)
    if admits(signature, node) then
      if needs then free = free or free_resources(node) end
      if not needs or fits(signature, free) then
        local n = needs and 1 or fair_share(queue.length, active_slots())
        local before = #found
        add_head(found, picky_queue(signature), n, 1, 17)
        for i = before + 1, #found do found[i].needs = needs end
      end
    end
  end
end

-- Take up to `want` keys out of the queues that the node shares in.
local function take_from_queues(node, want)
  local own, found, keys = home_queue(node), {}, {}
  local length, fresh = redis.call('ZCARD', own), added_members[node] or {}
  if length > 0 then
    add_fresh(found, own, fresh)
    add_head(found, own, fair_share(length, redis.call('SCARD', P .. K.node_slots .. node)), 1, 18, fresh)
  end
  add_picky(found, node)
  length = redis.call('ZCARD', SHARED)
  if length > 0 then add_head(found, SHARED, fair_share(length, active_slots()), 2, 17) end
  table.sort(found, is_before)
  local uses_resources = false
  for _, entry in ipairs(found) do
    if #keys < want and not (entry.needs and uses_resources) then
      uses_resources = uses_resources or entry.needs
      redis.call('ZREM', entry.queue, entry.member)
      keys[#keys + 1] = string.sub(entry.member, entry.start)
    end
  end
  return keys
end

-- Node queues that are not empty, other than the node's own, the longest first.
local function queues_elsewhere(node)
  local names, queues, found = all_nodes(), {}, {}
  if #names == 0 then return found end
  for i, name in ipairs(names) do queues[i] = home_queue(name) end
  if redis.call('EXISTS', unpack(queues)) == 0 then return found end
  for i, name in ipairs(names) do
    local length = name ~= node and redis.call('ZCARD', queues[i]) or 0
    if length > 0 then found[#found + 1] = {node = name, length = length} end
  end
  table.sort(found, function(a, b) return a.length > b.length or a.length == b.length and a.node < b.node end)
  return found
end

-- Take the key that is cheapest to move from the longest queue of another node where to wait costs more.
local function steal(node, lease_ms)
  for _, queue in ipairs(queues_elsewhere(node)) do
    local member = stealable(queue.node, queue.length, lease_ms)
    if member then
      redis.call('ZREM', home_queue(queue.node), member)
      redis.call('HINCRBY', P .. K.counts, C.stolen, 1)
      return {string.sub(member, 18)}
    end
  end
  return {}
end

-- Most steps find work in the shared queue alone.
local function take(node, want, lease_ms)
  if redis.call('EXISTS', home_queue(node), P .. K.constraints) > 0 then return take_from_queues(node, want) end
  if want > 1 then want = math.min(want, fair_share(redis.call('ZCARD', SHARED), active_slots())) end
  local head, keys = redis.call('ZPOPMIN', SHARED, want), {}
  for i = 1, #head, 2 do keys[#keys + 1] = string.sub(head[i], 17) end
  return keys
end
