-- Take over holds of clients that lost their names to this one.
-- LIB         record notices nodes copies queue tickets settle hold names relief
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        5 client          str
--             6 epoch           int   the number of these holds
--             7 notice_limit    int   bytes
--             8 most            int   holds taken over in this call
-- RETURNS     {holds left, tickets to send}; call again while any are left
-- ERRORS      UNKNOWN_CLIENT    its lease ran out
-- INVARIANTS  no key is without holder in between; what this client holds by itself keeps its number; it is told how
--             finished ones stand, and in the end that it has all; of the other nothing is left; works when Redis is full
-- COST        O(K): K holds taken over
local client, epoch, notice_limit, most = ARGV[5], ARGV[6], tonumber(ARGV[7]), tonumber(ARGV[8])
if not is_known_client(client) then return redis.error_reply('UNKNOWN_CLIENT ' .. client) end
relief()
local left = 0
for _, of in ipairs(inheritances(client)) do
  local keys = most > 0 and redis.call('SRANDMEMBER', P .. K.held .. of, most) or {}
  for _, key in ipairs(keys) do
    local r = load(key)
    if remove_holder(r, of) and not has_holder(r, client) then
      take_hold(client, epoch, r)
      note_standing(client, r, epoch, notice_limit)
    end
    settle_later(key)
  end
  drop_from_index(of, keys)
  most = most - #keys
  local rest = redis.call('SCARD', P .. K.held .. of)
  left = left + rest
  if rest == 0 then
    redis.call('HDEL', P .. K.heirs, of)
    redis.call('UNLINK', P .. K.notices .. of)
  end
end
flush_holds(client)
if left == 0 then note(client, '', epoch, 'i') end
return {left, finish()}
