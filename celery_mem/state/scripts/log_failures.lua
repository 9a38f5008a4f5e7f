-- Read what became of tasks that ran for nobody and failed; drop what was logged.
-- LIB         fence relief
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        3 fence           int   term of the coordinator
--             4 logged          int   entries at the head that were logged, and go
--             5 most            int   entries returned
-- RETURNS     entries: key, newline, blamed key, newline, pickled error (empty where data was lost)
-- ERRORS      FENCED            another coordinator leads
-- INVARIANTS  an entry is dropped after it was logged: one may be logged twice, none is missed
-- COST        O(entries)
local fenced = check_fence(ARGV[3])
if fenced then return fenced end
relief()
if ARGV[4] ~= '0' then redis.call('LTRIM', P .. K.failures, ARGV[4], -1) end
return redis.call('LRANGE', P .. K.failures, 0, ARGV[5] - 1)
