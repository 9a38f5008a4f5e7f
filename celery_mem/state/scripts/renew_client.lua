-- Give a client its lease, or renew it.
-- LIB         relief
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        3 client          str
--             4 lease           int   ms
--             5 join            0|1   1 makes a new client, 0 only renews
-- RETURNS     1
-- ERRORS      UNKNOWN_CLIENT    its lease ran out and what it held was released
-- INVARIANTS  works when Redis is full
-- COST        O(log C): C clients
relief()
if ARGV[5] ~= '1' and not redis.call('ZSCORE', P .. K.clients, ARGV[3]) then
  return redis.error_reply('UNKNOWN_CLIENT ' .. ARGV[3])
end
redis.call('ZADD', P .. K.clients, now() + tonumber(ARGV[4]), ARGV[3])
return 1
