-- Release everything a client holds: it closed, or its lease is over.
-- LIB         record notices nodes copies queue tickets settle hold relief fence
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        5 client          str
--             6 fence           int   term of the coordinator that found the lease over; empty: the client itself asks
--             7 most            int   holds dropped in this call
-- RETURNS     {holds left, tickets to send}; call again while any are left
-- ERRORS      FENCED            another coordinator leads
-- INVARIANTS  a coordinator ends only a client whose lease is over, judged by this script's own clock
-- COST        O(K + what is freed)
local client = ARGV[5]
local fenced = check_fence(ARGV[6])
if fenced then return fenced end
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
end
return {left, tickets}
