-- A slot is gone (its process ended, or its node's lease is over): what it was running is ready again.
-- LIB         record notices nodes copies queue tickets settle relief
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        5 slot            str
--             6 node            str
--             7 death           str   how it ended, one line
--             8 ...             pairs of a key that errs, as too many slots died with it, and its pickled error
-- RETURNS     {keys that it was running, keys erred for it, tickets to send}
-- INVARIANTS  nothing else counts as proof of death: the caller saw the process gone or the lease over;
--             a slot that comes back finds its attempts void
-- COST        O(tasks of the slot)
local slot, node, death = ARGV[5], ARGV[6], ARGV[7]
local errors = {}
for i = 8, #ARGV, 2 do errors[ARGV[i]] = ARGV[i + 1] end
relief()
local keys, killed, n_rerun = redis.call('HKEYS', P .. K.slot .. slot), {}, 0
for _, key in ipairs(keys) do
  local r = load(key)
  if r and r.state == 'processing' and extra(r, F.owner) == slot then
    local deaths = extra(r, F.deaths)
    redis.call('HSET', r.name, F.deaths, (deaths and deaths .. '\n' or '') .. death)
    if errors[key] then
      redis.call('HSET', r.name, F.error, errors[key])
      err(r, key)
      killed[#killed + 1] = key
    else
      withdraw(r)
      requeue(r)
      n_rerun = n_rerun + 1
    end
  end
end
if n_rerun > 0 then redis.call('HINCRBY', P .. K.counts, C.rerun, n_rerun) end
redis.call('ZREM', P .. K.slots, slot)
redis.call('ZREM', P .. K.idle, slot)
redis.call('SREM', P .. K.node_slots .. node, slot)
redis.call('UNLINK', P .. K.wake .. slot)
local tickets = finish()
return {keys, killed, tickets}
