-- Give a client a name with a lease of its own; whoever had the name loses it, and this client is to inherit its holds.
-- LIB         relief names
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        3 client          str
--             4 name            str
--             5 lease           int   ms
-- RETURNS     clients whose holds it is to inherit (inherit.lua)
-- INVARIANTS  a name belongs to one client; the one that lost it is no known client from here on, so nothing that it
--             submits or holds counts any more, and it is told; what it holds stays, for the lease of its heir;
--             works when Redis is full
-- COST        O(log C + H): C clients, H that lost their names just now
local client, name = ARGV[3], ARGV[4]
relief()
redis.call('ZADD', P .. K.clients, now() + tonumber(ARGV[5]), client)
local before = redis.call('HGET', P .. K.names, name)
if before ~= client then
  redis.call('HSET', P .. K.names, name, client)
  if before and redis.call('ZREM', P .. K.clients, before) == 1 then
    redis.call('HSET', P .. K.heirs, before, client)
    redis.call('XADD', P .. K.notices .. before, '*', '', '0 t')
    for _, of in ipairs(inheritances(before)) do redis.call('HSET', P .. K.heirs, of, client) end
  end
end
return inheritances(client)
