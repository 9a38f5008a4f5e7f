-- Put messages into the mailbox of a node's agent.
-- LIB         relief
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        3 node            str
--             4 ...             messages
-- RETURNS     1, or 0 where the node is not alive and nothing was done
-- INVARIANTS  a node that is gone has no mailbox; works when Redis is full
-- COST        O(M): M messages
relief()
if not redis.call('ZSCORE', P .. K.nodes, ARGV[3]) then return 0 end
redis.call('RPUSH', P .. K.mail .. ARGV[3], unpack(ARGV, 4))
return 1
