-- Find the ready tasks that no live node may run.
-- LIB         record nodes relief
-- KEYS        1 meta            hash  {ns}:meta
-- RETURNS     per constraint: it (empty for tasks without one), number of tasks, since when in ms as text
-- INVARIANTS  that time is of the first call that found it so, and is forgotten by one that does not; a paused node counts,
--             one that is retiring or stopping does not; works when Redis is full
-- COST        O(C * N): C constraints, N nodes
relief()
local found, out = {}, {}
local shared = redis.call('ZCARD', P .. K.ready)
if shared > 0 and not is_runnable('') then found[''] = shared end
for _, queue in ipairs(waiting_constraints()) do
  if not is_runnable(queue.signature) then found[queue.signature] = queue.length end
end
for _, signature in ipairs(redis.call('HKEYS', P .. K.unrunnable)) do
  if not found[signature] then redis.call('HDEL', P .. K.unrunnable, signature) end
end
for signature, length in pairs(found) do
  redis.call('HSETNX', P .. K.unrunnable, signature, now())
  local n = #out
  out[n + 1], out[n + 2] = signature, length
  out[n + 3] = redis.call('HGET', P .. K.unrunnable, signature)
end
return out
