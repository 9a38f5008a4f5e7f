-- Take the holds that a client had before Redis lost track of it: its lease ran out, or the last writes are missing.
-- LIB         record notices nodes copies queue tickets settle hold
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        5 client          str
--             6 lease           int   ms
--             7 notice_limit    int   bytes
--             8 begin           0|1   1: give the client its lease and drop what notices it has, which are of the past
--             9 ...             pairs: key, epoch
-- RETURNS     {keys without a record, tickets to send}
-- ERRORS      UNKNOWN_CLIENT    its lease ran out, and this is not the beginning
-- INVARIANTS  each hold has the number that the client knows it by; the client is told how finished ones stand
-- COST        O(K + what is raised)
local client, notice_limit = ARGV[5], tonumber(ARGV[7])
if ARGV[8] == '1' then
  redis.call('UNLINK', P .. K.notices .. client)
  redis.call('ZADD', P .. K.clients, now() + tonumber(ARGV[6]), client)
elseif not is_known_client(client) then return redis.error_reply('UNKNOWN_CLIENT ' .. client) end
local unknown = {}
for a = 9, #ARGV, 2 do
  local key, epoch = ARGV[a], ARGV[a + 1]
  local r = load(key)
  if r then
    take_hold(client, epoch, r)
    note_standing(client, r, epoch, notice_limit)
    settle_later(key)
  else
    unknown[#unknown + 1] = key
  end
end
flush_holds(client)
return {unknown, finish()}
