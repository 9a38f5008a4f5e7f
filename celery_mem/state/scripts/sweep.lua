-- Go on with what scripts with a spent budget left unsettled.
-- LIB         record notices nodes copies queue tickets settle relief fence
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        5 fence           int   term of the coordinator
--             6 most            int   keys taken in this call
-- RETURNS     {keys left unsettled, tickets to send}
-- ERRORS      FENCED            another coordinator leads
-- INVARIANTS  repeating it does no harm: settling a settled key changes nothing
-- COST        O(what is settled), at most `budget` records
local fenced = check_fence(ARGV[5])
if fenced then return fenced end
relief()
for _, key in ipairs(redis.call('SPOP', P .. K.unsettled, tonumber(ARGV[6]))) do settle_later(key) end
local tickets = finish()
return {redis.call('SCARD', P .. K.unsettled), tickets}
