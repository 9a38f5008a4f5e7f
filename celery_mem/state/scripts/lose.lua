-- Copies are not at a place any more: lost, or found missing by whoever came to read them.
-- LIB         record notices nodes copies queue tickets settle lose relief
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        5 place           str   node, or @redis
--             6 ...             pairs: key, token
-- RETURNS     tickets to send
-- INVARIANTS  a result without copies is made again, and so are those of its inputs that are gone, no others; what waits
--             or is ready for it waits for it; without lineage it is lost and what waits for it errs; holders are told;
--             a live node is told to drop what it may have left of the copy; works when Redis is full
-- COST        O(K + D + what is raised): K keys, D dependents of them; at most `budget` records are raised
local place = ARGV[5]
relief()
for a = 6, #ARGV, 2 do lose_copy(ARGV[a], ARGV[a + 1], place) end
return finish()
