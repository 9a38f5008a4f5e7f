-- Give up all that the namespace holds, because a client asks for it: nobody who joined before is heard any more, and
-- nobody joins before what there was is deleted (clear.lua).
-- LIB         relief
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        3 generation      str   random id of the namespace's next life
--             4 reason          str   for the error texts of everybody's futures
-- RETURNS     nothing
-- INVARIANTS  a repeat is refused, as it did not join what it would restart; numbers that were given out are not given
--             out again; works when Redis is full
-- COST        O(C): C clients, who are told
relief()
redis.call('HSET', KEYS[1], M.generation, '~' .. ARGV[3], M.restarted, ARGV[4], M.capacity, 0)
for _, client in ipairs(redis.call('ZRANGE', P .. K.clients, 0, -1)) do
  redis.call('XADD', P .. K.notices .. client, '*', '', '0 r')
  redis.call('PEXPIRE', P .. K.notices .. client, 10000)      -- clear.lua leaves it until then
end
