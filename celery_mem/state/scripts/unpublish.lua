-- Take a dataset back.
-- LIB         relief
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        3 name            str
-- RETURNS     its holder, whose holds are to be released (expire_client.lua), or '' if there is no such dataset
-- INVARIANTS  its holder has a lease that is over: if nobody else does, the coordinator releases what it holds;
--             works when Redis is full
-- COST        O(1)
relief()
local found = redis.call('HGET', P .. K.datasets, ARGV[3])
if not found then return '' end
local holder = string.match(found, '^([^\n]*)\n')
redis.call('HDEL', P .. K.datasets, ARGV[3])
redis.call('ZADD', P .. K.clients, 0, holder)
return holder
