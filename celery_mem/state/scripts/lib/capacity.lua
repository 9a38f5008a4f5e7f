-- Invariant: meta.capacity == sum of the slots of the nodes whose lease has not run out.
local function count_capacity()
  local total = 0
  for _, name in ipairs(redis.call('ZRANGEBYSCORE', P .. K.nodes, now(), '+inf')) do
    total = total + tonumber(redis.call('HGET', P .. K.node .. name, N.slots) or 0)
  end
  redis.call('HSET', KEYS[1], M.capacity, total)
end
