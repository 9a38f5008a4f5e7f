-- Reserve tickets for ready work that no slot and no ticket on its way will take.
-- LIB         record queue fence
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        3 fence           int   term of the coordinator; empty for a worker that has just come
--             4 ticket_lease    int   ms
-- RETURNS     tickets to send
-- ERRORS      FENCED            another coordinator leads
-- INVARIANTS  tickets whose lease is over are given up: their message is lost or late, either does no harm
-- COST        O(log T + slots woken)
local fenced = check_fence(ARGV[3])
if fenced then return fenced end
redis.call('ZREMRANGEBYSCORE', P .. K.tickets, '-inf', '(' .. now)
local ready = redis.call('ZCARD', P .. K.ready)
if ready == 0 then return {} end
return reserve_tickets(ready - wake(ready), tonumber(ARGV[4]))
