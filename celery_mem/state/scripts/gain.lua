-- Copies were made at a place.
-- LIB         record notices nodes copies queue tickets settle relief
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        5 place           str   node, @redis or @durable: then the bytes were written beforehand
--             6 ...             pairs: key, token
-- RETURNS     keys whose copy is to be dropped: their record names another token or none, the blob is not there, the
--             node is not alive, or a durable file of that name is about to be deleted
-- INVARIANTS  a key has at most one copy per place; what a repeat finds recorded is not refused; what is to be durable
--             and now is gives up its lineage; works when Redis is full
-- COST        O(K): K keys
local place, refused = ARGV[5], {}
relief()
for a = 6, #ARGV, 2 do
  local key, token = ARGV[a], ARGV[a + 1]
  local r = load(key)
  local copies = r and copies_of(r)
  if not copies or copies.token ~= token or not is_place(place)
    or place == DURABLE and redis.call('SISMEMBER', P .. K.debris, token) == 1
    or place == REDIS and not has_blob(token, key) then refused[#refused + 1] = key
  else
    if place == REDIS then keep_blob(token, key) end
    if not has_copy(r, token, place) then add_copy(r, place) end
    see_durable(r)
  end
end
finish()
return refused
