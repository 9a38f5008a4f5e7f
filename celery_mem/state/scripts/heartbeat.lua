-- A node says that it lives, and with it the slots that its agent sees alive.
-- LIB         relief capacity
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        3 node            str
--             4 lease           int   ms
--             5 queue           str   Celery queue that it takes tickets from; empty leaves it as it is
--             6 ...             pairs of fields of the node hash, only where something is new
-- RETURNS     the node's slots that run a ticket
-- INVARIANTS  meta.capacity is the sum of the slots of all live nodes; works when Redis is full
-- COST        O(N + S): N nodes, S slots of this one
local node, deadline = ARGV[3], now() + tonumber(ARGV[4])
relief()
redis.call('ZADD', P .. K.nodes, deadline, node)
if #ARGV > 5 then redis.call('HSET', P .. K.node .. node, unpack(ARGV, 6)) end
if ARGV[5] ~= '' then redis.call('HSET', KEYS[1], M.queue, ARGV[5]) end
local slots = redis.call('SMEMBERS', P .. K.node_slots .. node)
for _, slot in ipairs(slots) do redis.call('ZADD', P .. K.slots, deadline, slot) end
count_capacity()
return slots
