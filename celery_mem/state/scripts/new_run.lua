-- Another server process answers than the one that the namespace met last: after a fail-over or a restart the last
-- writes may be missing. The generation changes, so that everybody who joined before is refused once and looks what
-- became of what they know of; numbers that may have been given out in what is missing are not given out again.
-- LIB         relief
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        1 run             str   id of the server process
-- RETURNS     the generation id that holds from now on; empty if there is no namespace
-- INVARIANTS  a repeat changes nothing; works when Redis is full
-- COST        O(1)
local found = redis.call('HMGET', KEYS[1], M.generation, M.run)
local generation = found[1]
if not generation then return '' end
if found[2] == ARGV[1] then return generation end
relief()
if found[2] then
  local birth, number = string.match(generation, '^([^.]*)%.?(%d*)$')
  generation = birth .. '.' .. string.format('%.0f', (tonumber(number) or 0) + 1)
  redis.call('HINCRBY', KEYS[1], M.attempts, 1000000000)      -- more than any server loses
  redis.call('HINCRBY', KEYS[1], M.ticket_ids, 1000000000)
  redis.call('HINCRBY', KEYS[1], M.submissions, 1000000)      -- 16^10 in all
  redis.call('HINCRBY', KEYS[1], M.fence, 1000000)
end
redis.call('HSET', KEYS[1], M.generation, generation, M.run, ARGV[1])
return generation
