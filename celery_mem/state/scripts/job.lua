-- Put a job of the coordinator on the list, tell how far it is, or take it off.
-- LIB         relief fence
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        3 job             str   its id
--             4 progress        str   JSON; empty takes it off
--             5 fence           int   term of the coordinator; empty for a client that asks for a job
-- RETURNS     1
-- ERRORS      FENCED            another coordinator leads
-- COST        O(1)
local fenced = check_fence(ARGV[5])
if fenced then return fenced end
relief()
if ARGV[4] == '' then redis.call('HDEL', P .. K.jobs, ARGV[3])
else redis.call('HSET', P .. K.jobs, ARGV[3], ARGV[4]) end
return 1
