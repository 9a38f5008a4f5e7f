-- Holds: a client's counted reference to a key. Invariant: the holders of a record and c:<client> say the same.
local held_now = {}

local function take_hold(client, epoch, r)
  remove_holder(r, client)
  add_holder(r, client, epoch)
  held_now[#held_now + 1] = r.key
end

local function flush_holds(client)
  for i = 1, #held_now, 2000 do
    redis.call('SADD', P .. K.held .. client, unpack(held_now, i, math.min(i + 1999, #held_now)))
  end
end

local function is_known_client(client) return redis.call('ZSCORE', P .. K.clients, client) end

-- Returns whether there was a hold. The caller takes the key off the client's index, many at once.
local function drop_hold(client, key)
  local r = load(key)
  return r and remove_holder(r, client)
end

local function drop_from_index(client, keys)
  for i = 1, #keys, 2000 do
    redis.call('SREM', P .. K.held .. client, unpack(keys, i, math.min(i + 1999, #keys)))
  end
end
