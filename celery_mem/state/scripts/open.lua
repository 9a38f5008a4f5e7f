-- Join the namespace; the first one to come gives it its birth id.
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        1 generation      str   random id, used if the namespace has none
--             2 schema          int   version of the layout that the caller knows
--             3 run             str   id of the server process, empty if unknown
-- RETURNS     the generation id that holds
-- ERRORS      SCHEMA            the namespace has another layout
--             RESTARTING        what it held before is being deleted; names its generation
-- COST        O(1)
local found = redis.call('HMGET', KEYS[1], M.generation, M.schema)
if found[2] and found[2] ~= ARGV[2] then
  return redis.error_reply('SCHEMA the namespace has layout ' .. found[2] .. ', this version knows ' .. ARGV[2])
end
if found[1] and string.byte(found[1]) == 126 then return redis.error_reply('RESTARTING ' .. found[1]) end      -- '~'
if found[1] then return found[1] end
redis.call('HSET', KEYS[1], M.generation, ARGV[1], M.schema, ARGV[2])
if ARGV[3] ~= '' then redis.call('HSET', KEYS[1], M.run, ARGV[3]) end
return ARGV[1]
