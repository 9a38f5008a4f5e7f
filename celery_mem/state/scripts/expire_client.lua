-- Release everything a client or a dataset holds: it closed, its lease is over, or it was taken back.
-- LIB         record notices nodes copies queue tickets settle hold names relief fence
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        5 client          str
--             6 fence           int   term of the coordinator that found the lease over; empty: the client itself asks
--             7 most            int   holds dropped in this call
-- RETURNS     {holds left, tickets to send}; call again while any are left
-- ERRORS      FENCED            another coordinator leads
-- INVARIANTS  one that lost its name has nothing to release; a coordinator ends only a client whose lease is over, judged by this script's own clock
-- COST        O(K + what is freed + N): N clients with names
local client = ARGV[5]
local fenced = check_fence(ARGV[6])
if fenced then return fenced end
if redis.call('HEXISTS', P .. K.heirs, client) == 1 then return {0, {}} end      -- it lost its name, and another inherits
relief()
if ARGV[6] ~= '' then
  local deadline = tonumber(redis.call('ZSCORE', P .. K.clients, client) or 0)
  if deadline > now() then return {0, {}} end
end
local keys = redis.call('SRANDMEMBER', P .. K.held .. client, tonumber(ARGV[7]))
for _, key in ipairs(keys) do
  drop_hold(client, key)
  settle_later(key)
end
drop_from_index(client, keys)
local left = redis.call('SCARD', P .. K.held .. client)
local tickets = finish()
if left == 0 then
  redis.call('ZREM', P .. K.clients, client)
  redis.call('UNLINK', P .. K.notices .. client)
  local names = redis.call('HGETALL', P .. K.names)
  for i = 1, #names, 2 do
    if names[i + 1] == client then redis.call('HDEL', P .. K.names, names[i]) end
  end
  for _, of in ipairs(inheritances(client)) do      -- nobody inherits them any more: their turn to expire
    redis.call('HDEL', P .. K.heirs, of)
    redis.call('ZADD', P .. K.clients, 0, of)
  end
end
return {left, tickets}
