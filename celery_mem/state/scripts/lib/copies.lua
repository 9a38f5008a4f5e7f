-- Copies: a result that is too large for Redis is in the memory of nodes, or in blobs; its record says where.
-- Invariant: nk:<node> names exactly the keys with a copy there; every copy is on a live node, in Redis or in a durable file.
local REDIS, DURABLE = '@redis', '@durable'

-- Node -> key -> whether it has a copy there from now on; node -> messages for its agent.
local node_changes, letters = {}, {}

local function outlives_nodes(place) return place == REDIS or place == DURABLE end

local function index_copy(place, key, is_there)
  if outlives_nodes(place) then return end
  local changes = node_changes[place] or {}
  node_changes[place] = changes
  changes[key] = is_there
end

local function is_place(place) return outlives_nodes(place) or node_of(place) end

-- Where the copies of r are, as told in keys.py; nil if it has none.
local function copies_of(r)
  if not has_flag(r, L.replicas) then return nil end
  if not r.copies then
    local token, maker, nbytes, places = string.match(extra(r, F.replicas), '^([^\n]*)\n([^\n]*)\n([^\n]*)\n(.*)$')
    r.copies = {token = token, maker = maker, nbytes = nbytes, places = split(places)}
  end
  return r.copies
end

local function has_copy(r, token, place)
  local copies = r and copies_of(r)
  if not copies or copies.token ~= token then return false end
  for _, other in ipairs(copies.places) do
    if other == place then return true end
  end
  return false
end

-- A copy may be brought again by a call that is repeated: then it is the one that the record names, or is it not?
local function keep_again(r, token, place)
  local is_named = has_copy(r, token, place)
  if is_named and place == REDIS then keep_blob(token, r.key) end
  return is_named
end

local function write_copies(r)
  local c = r.copies
  redis.call('HSET', r.name, F.replicas, c.token .. '\n' .. c.maker .. '\n' .. c.nbytes .. '\n' .. table.concat(c.places, '\n'))
end

-- The result of r has its first copy.
local function begin_copies(r, token, maker, nbytes, place)
  r.copies = {token = token, maker = maker, nbytes = nbytes, places = {place}}
  add_flag(r, L.replicas)
  write_copies(r)
  index_copy(place, r.key, true)
  if place == REDIS then keep_blob(token, r.key) end
end

local function add_copy(r, place)
  local places = copies_of(r).places
  places[#places + 1] = place
  write_copies(r)
  index_copy(place, r.key, true)
end

local function write_to(node, letter)
  local list = letters[node] or {}
  letters[node] = list
  list[#list + 1] = letter
end

-- Have the copy at a place deleted: a blob here, a durable file by the coordinator, any other by the agent of its node.
local function delete_copy(place, token, key)
  if place == REDIS then drop_blob(token, key)
  elseif place == DURABLE then redis.call('SADD', P .. K.debris, token)
  elseif node_of(place) then write_to(place, 'd ' .. token) end
end

local function remove_copy(r, place)
  local copies = copies_of(r)
  local left = {}
  for _, other in ipairs(copies.places) do
    if other ~= place then left[#left + 1] = other end
  end
  copies.places = left
  delete_copy(place, copies.token, r.key)
  index_copy(place, r.key, false)
  if #left > 0 then write_copies(r) end
end

local function remove_copies(r)
  local copies = copies_of(r)
  if not copies then return end
  for _, place in ipairs(copies.places) do
    delete_copy(place, copies.token, r.key)
    index_copy(place, r.key, false)
  end
  r.copies = nil
  redis.call('HDEL', r.name, F.replicas)
  remove_flag(r, L.replicas)
end

-- Copies that are wanted beyond the first: their number, and nodes of which each is to have one.
local function wanted_copies(r)
  if not has_flag(r, L.copies) then return 1, {} end
  local v = redis.call('HMGET', r.name, F.copies, F.copies_on)
  return tonumber(v[1] or 1), split(v[2] or '')
end

local function want_no_copies(r)
  if not has_flag(r, L.copies) then return end
  redis.call('HDEL', r.name, F.copies, F.copies_on)
  redis.call('SREM', P .. K.copies, r.key)
  remove_flag(r, L.copies)
end

local function want_copies(r, n, nodes)
  redis.call('HSET', r.name, F.copies, n, F.copies_on, nodes)
  redis.call('SADD', P .. K.copies, r.key)
  add_flag(r, L.copies)
end

local function flush_copies()
  for node, changes in pairs(node_changes) do
    local joining, leaving = {}, {}
    for key, is_there in pairs(changes) do
      local list = is_there and joining or leaving
      list[#list + 1] = key
    end
    call_in_parts('SREM', leaving, P .. K.node_keys .. node)
    call_in_parts('SADD', joining, P .. K.node_keys .. node)
  end
  for node, messages in pairs(letters) do call_in_parts('RPUSH', messages, P .. K.mail .. node) end
  node_changes, letters = {}, {}
end
