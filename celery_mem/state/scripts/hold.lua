-- Take a hold on keys that exist, as when a future arrives in another process.
-- LIB         record notices nodes copies queue tickets settle hold
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        5 client          str
--             6 epoch           int
--             7 notice_limit    int   bytes
--             8 ...             keys
-- RETURNS     {keys without a record, tickets to send}
-- ERRORS      UNKNOWN_CLIENT    its lease ran out
-- INVARIANTS  a released key that gets a holder is made again; the client is told how finished ones stand
-- COST        O(K + what is raised)
local client, epoch, notice_limit = ARGV[5], ARGV[6], tonumber(ARGV[7])
if not is_known_client(client) then return redis.error_reply('UNKNOWN_CLIENT ' .. client) end
local unknown = {}
for i = 8, #ARGV do
  local r = load(ARGV[i])
  if r then
    take_hold(client, epoch, r)
    note_standing(client, r, epoch, notice_limit)
    settle_later(r.key)
  else
    unknown[#unknown + 1] = ARGV[i]
  end
end
flush_holds(client)
return {unknown, finish()}
