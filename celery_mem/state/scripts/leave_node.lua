-- A node goes: it stopped in good order, or its lease is over and its slots were abandoned.
-- LIB         relief capacity fence
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        3 node            str
--             4 fence           int   term of the coordinator that found the lease over; empty: the node itself asks
-- RETURNS     slots of the node that still run a ticket; while any are left the node stays
-- ERRORS      FENCED            another coordinator leads
-- INVARIANTS  a coordinator ends only a node whose lease is over, judged by this script's own clock
-- COST        O(N): N nodes
local node = ARGV[3]
local fenced = check_fence(ARGV[4])
if fenced then return fenced end
relief()
if ARGV[4] ~= '' and tonumber(redis.call('ZSCORE', P .. K.nodes, node) or 0) > now then return {} end
local slots = redis.call('SMEMBERS', P .. K.node_slots .. node)
if #slots == 0 then
  redis.call('ZREM', P .. K.nodes, node)
  redis.call('UNLINK', P .. K.node .. node)
end
count_capacity()
return slots
