-- Durable files were deleted, or turned out to be none.
-- LIB         fence relief
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        3 fence           int   term of the coordinator
--             4 ...             tokens
-- RETURNS     tokens left
-- ERRORS      FENCED            another coordinator leads
-- INVARIANTS  works when Redis is full; a repeat does no harm, as no token is given twice
-- COST        O(T): T tokens
local fenced = check_fence(ARGV[3])
if fenced then return fenced end
relief()
if #ARGV > 3 then redis.call('SREM', P .. K.debris, unpack(ARGV, 4)) end
return redis.call('SCARD', P .. K.debris)
