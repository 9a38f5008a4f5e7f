-- Delete keys of the namespace that a restart gave up. Anybody may, who would join; so no lease is needed for it.
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        1 generation      str   "~" and the id of the next life, as the caller found it
--             2 last            0|1   nothing else is left: the next life begins
--             3 ...             keys
-- RETURNS     1, or 0 if the next life has begun: then nothing is done
-- INVARIANTS  durable files of results that are deleted here will be deleted; what comes late does no harm
-- COST        O(K)
if redis.call('HGET', KEYS[1], M.generation) ~= ARGV[1] then return 0 end
local P = string.sub(KEYS[1], 1, -5)
local tasks, notices = P .. K.task, P .. K.notices
for i = 3, #ARGV do
  local name = ARGV[i]
  if string.sub(name, 1, #tasks) == tasks then
    local replicas = redis.call('HGET', name, F.replicas)
    if replicas and string.find(replicas .. '\n', '\n@durable\n', 1, true) then
      redis.call('SADD', P .. K.debris, string.match(replicas, '^[^\n]*'))
    end
  end
  -- A client that is told of the restart reads so in a stream that will be gone by itself.
  if string.sub(name, 1, #notices) ~= notices or redis.call('PTTL', name) == -1 then redis.call('UNLINK', name) end
end
if ARGV[2] == '1' then redis.call('HSET', KEYS[1], M.generation, string.sub(ARGV[1], 2)) end
return 1
