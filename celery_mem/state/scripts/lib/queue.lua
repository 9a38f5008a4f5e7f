-- Ready queues. A ready task is in exactly one: that of its constraint if it has one; else that of its home, a node
-- that it prefers or that has most bytes of its inputs; else the shared one. Members are rank + key; in the queue
-- of a node a letter between both is the size class of its inputs there, which tells what it takes to move it.
local SHARED = P .. K.ready
local SIZE_CLASSES = '0123456789abcdefghijklmnopqrstuvwxyz'    -- class n: less than 2^(n + 17) bytes

local function home_queue(node) return P .. K.home_queue .. node end
local function picky_queue(signature) return P .. K.picky .. signature end

-- Tasks that become ready in this call, and the entries of those that left a queue. The first are written after
-- the others, once it is settled what is ready, by then with a home.
local readied, unreadied = {}, {}
-- What was added in this call: to the shared queue, to node -> count, to constraint -> count; and for a node -> members.
local added_shared, added_home, added_picky, added_members = 0, {}, {}, {}

-- Size class and node of the home of a ready task, or false.
local function home_of(r)
  if r.home == nil then
    r.home = (has_flag(r, L.near) or has_flag(r, L.prefer)) and extra(r, F.home)
  end
  return r.home
end

local function set_home(r, home)
  if home then redis.call('HSET', r.name, F.home, home)
  elseif home_of(r) then redis.call('HDEL', r.name, F.home) end
  r.home = home
end

-- Queue and member of a ready task, as its record says.
local function entry_of(r)
  if has_flag(r, L.constraint) then return picky_queue(signature_of(r)), rank_of(r) .. r.key end
  local home = home_of(r)
  if home then return home_queue(string.sub(home, 2)), rank_of(r) .. string.sub(home, 1, 1) .. r.key end
  return SHARED, rank_of(r) .. r.key
end

local function enqueue(r)
  r.waiting = 0
  set_state(r, 'ready')
  readied[r.key] = r
end

local function dequeue(r)
  if readied[r.key] then readied[r.key] = nil
  else
    local queue, member = entry_of(r)
    unreadied[#unreadied + 1] = {queue = queue, member = member}
  end
end

local function size_class(nbytes)
  local n = 0
  while nbytes >= 131072 and n < 35 do
    nbytes = nbytes / 2
    n = n + 1
  end
  return string.sub(SIZE_CLASSES, n + 1, n + 1)
end

local function move_ms(letter)
  return 1 + 2 ^ (string.find(SIZE_CLASSES, letter, 1, true) + 16) / 1e6
end

-- Node that takes tasks -> bytes of the inputs of r there; inputs of no bytes are as near to any other.
local function bytes_of_inputs(r)
  local bytes = {}
  for _, dep in ipairs(deps_of(r)) do
    local d = load(dep)
    local copies = d and copies_of(d)
    local nbytes = copies and tonumber(copies.nbytes) or 0
    for _, place in ipairs(nbytes > 0 and copies.places or {}) do
      if place ~= REDIS and takes_tasks(place) then bytes[place] = (bytes[place] or 0) + nbytes end
    end
  end
  return bytes
end

local queue_lengths = {}
local function queue_length(node)
  queue_lengths[node] = queue_lengths[node] or redis.call('ZCARD', home_queue(node))
  return queue_lengths[node] + (added_home[node] or 0)
end

-- Choose the queue of a ready task. Of several equal homes it is the one with the shortest queue.
local function place(r)
  if not (has_flag(r, L.near) or has_flag(r, L.prefer)) or has_flag(r, L.constraint) then return end
  local bytes, candidates = has_flag(r, L.near) and bytes_of_inputs(r) or {}, {}
  local preferred = has_flag(r, L.prefer) and split(extra(r, F.prefer)) or {}
  for _, node in ipairs(preferred) do
    if takes_tasks(node) then candidates[node] = bytes[node] or 0 end
  end
  if not next(candidates) then candidates = bytes end
  local home
  for node, n in pairs(candidates) do
    if not home or n > candidates[home] or n == candidates[home]
      and (queue_length(node) < queue_length(home) or queue_length(node) == queue_length(home) and node < home) then
      home = node
    end
  end
  set_home(r, home and size_class(candidates[home]) .. home)
end

local function count_added(r, member)
  local signature = signature_of(r)
  if signature ~= '' then added_picky[signature] = (added_picky[signature] or 0) + 1
  elseif home_of(r) then
    local node = string.sub(home_of(r), 2)
    added_home[node] = (added_home[node] or 0) + 1
    added_members[node] = added_members[node] or {}
    added_members[node][member] = true
  else added_shared = added_shared + 1 end
end

-- Once, before the records are written.
local function flush_queues()
  for _, entry in ipairs(unreadied) do redis.call('ZREM', entry.queue, entry.member) end
  local lists = {}
  for _, r in pairs(readied) do
    local queue, member
    if r.flags == '' then      -- as mostly: for any node
      queue, member = SHARED, rank_of(r) .. r.key
      added_shared = added_shared + 1
    else
      place(r)
      queue, member = entry_of(r)
      count_added(r, member)
    end
    local list = lists[queue]
    if not list then
      list = {}
      lists[queue] = list
    end
    local n = #list
    list[n + 1], list[n + 2] = priority_of(r) == '0' and 0 or -tonumber(r.priority), member
  end
  for queue, list in pairs(lists) do call_in_parts('ZADD', list, queue) end
  readied, unreadied = {}, {}
end
