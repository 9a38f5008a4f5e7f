-- Somebody looks at the memory of nodes, or records what runs: begin, go on, or end.
-- LIB         relief
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        3 watcher         str   id, never given twice
--             4 lease           int   ms; 0 ends it. The same for all watchers: the keys live as long as the last one
--             5 records         0|1   whether slots are to note what they run
-- RETURNS     1 if it goes on, 0 if it begins or has ended
-- INVARIANTS  nothing is left of a watcher that died once its lease is over; slots note what they take from here on;
--             works when Redis is full
-- COST        O(log W): W watchers
relief()
local watcher, lease = ARGV[3], tonumber(ARGV[4])
local lines = P .. K.lines .. watcher
if lease == 0 then
  redis.call('ZREM', P .. K.watchers, watcher)
  redis.call('ZREM', P .. K.recordings, watcher)
  redis.call('UNLINK', lines)
  return 0
end
local function enlist(name)
  redis.call('ZREMRANGEBYSCORE', name, '-inf', now())
  local is_new = redis.call('ZADD', name, now() + lease, watcher)
  redis.call('PEXPIRE', name, lease)
  return 1 - is_new
end
local goes_on = enlist(P .. K.watchers)
if ARGV[5] == '1' then
  goes_on = goes_on * enlist(P .. K.recordings)
  if redis.call('EXISTS', lines) == 0 then
    goes_on = 0
    redis.call('XADD', lines, '*', 'l', '')      -- slots write into a stream that is there, and make none
  end
  redis.call('PEXPIRE', lines, lease)
end
return goes_on
