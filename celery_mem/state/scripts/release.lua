-- Drop a client's holds; data and records that nobody wants any more go with them.
-- LIB         record notices nodes copies queue tickets settle hold relief
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        5 client          str
--             6 ...             keys; unknown ones and ones that it does not hold are passed over
-- RETURNS     tickets to send
-- INVARIANTS  data goes if and only if it has no holder and no unfinished dependent; works when Redis is full
-- COST        O(K + what is freed), at most `budget` records
local client = ARGV[5]
relief()
local keys = {unpack(ARGV, 6)}
for _, key in ipairs(keys) do
  if drop_hold(client, key) then settle_later(key) end
end
drop_from_index(client, keys)
return finish()
