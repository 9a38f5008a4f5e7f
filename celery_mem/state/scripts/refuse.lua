-- Err ready tasks that no live node may run.
-- LIB         record notices nodes copies queue tickets settle relief fence
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        5 constraint      str   theirs; empty for tasks without one
--             6 error           str   pickled error
--             7 fence           int   term of the coordinator
--             8 most            int   tasks erred in this call
-- RETURNS     {tasks left, tickets to send}; call again while any are left
-- ERRORS      FENCED            another coordinator leads
-- INVARIANTS  a constraint that some live node meets by now is left alone; works when Redis is full
-- COST        O(T + what errs with them): T tasks
local signature = ARGV[5]
local fenced = check_fence(ARGV[7])
if fenced then return fenced end
relief()
if is_runnable(signature) then return {0, {}} end
local queue = signature == '' and P .. K.ready or P .. K.picky .. signature
for _, member in ipairs(redis.call('ZRANGE', queue, 0, ARGV[8] - 1)) do
  local r = load(string.sub(member, 17))
  redis.call('HSET', r.name, F.error, ARGV[6])
  err(r, r.key)
end
local tickets = finish()
return {redis.call('ZCARD', queue), tickets}
