-- Give a dataset its name. Its holder took the holds beforehand, as a client with a lease does.
-- LIB         hold
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        3 name            str
--             4 holder          str   "#" and a token that is never given twice
--             5 override        0|1   1 puts it in the place of one that has the name
--             6 content         str   pickled
-- RETURNS     the holder of the one that had the name, whose holds are to be released (expire_client.lua), or ''
-- ERRORS      DATASET_EXISTS    the name is taken; nothing was written
--             UNKNOWN_CLIENT    the lease of its holder ran out
-- INVARIANTS  a dataset has no lease: its holds stay until it is taken back
-- COST        O(1)
local name, holder = ARGV[3], ARGV[4]
local found = redis.call('HGET', P .. K.datasets, name)
local before = found and string.match(found, '^([^\n]*)\n')
if before == holder then return '' end      -- a repeat
if before and ARGV[5] ~= '1' then return redis.error_reply('DATASET_EXISTS ' .. name) end
if not is_known_client(holder) then return redis.error_reply('UNKNOWN_CLIENT ' .. holder) end
redis.call('HSET', P .. K.datasets, name, holder .. '\n' .. ARGV[6])
redis.call('ZREM', P .. K.clients, holder)
if before then redis.call('ZADD', P .. K.clients, 0, before) end
return before or ''
