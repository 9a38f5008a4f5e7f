-- Become the leading coordinator, or stay it.
-- LIB         relief
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        3 coordinator     str
--             4 lease           int   ms; 0 resigns
-- RETURNS     {1 if the caller leads, term, ms until the lease of whoever leads ends}
-- INVARIANTS  each new leader has a term of its own, higher than all before; works when Redis is full
-- COST        O(1)
relief()
local name, lease = P .. K.leader, tonumber(ARGV[4])
local leader = redis.call('GET', name)
if lease == 0 then
  if leader == ARGV[3] then redis.call('UNLINK', name) end
  return {0, '', 0}
end
if not leader then
  redis.call('SET', name, ARGV[3], 'PX', lease)
  return {1, tostring(redis.call('HINCRBY', KEYS[1], M.fence, 1)), lease}
end
if leader ~= ARGV[3] then return {0, '', redis.call('PTTL', name)} end
redis.call('PEXPIRE', name, lease)
return {1, redis.call('HGET', KEYS[1], M.fence), lease}
