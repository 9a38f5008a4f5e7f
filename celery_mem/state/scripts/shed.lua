-- Drop copies that are not needed.
-- LIB         record notices nodes copies queue tickets settle relief
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        5 place           str   node, or @redis
--             6 ...             pairs: key, token
-- RETURNS     keys whose copy there is dropped: at once, or by the agent of its node, which has mail
-- INVARIANTS  one copy stays, and as many on nodes as were asked for; a node that was named keeps its copy;
--             works when Redis is full
-- COST        O(K): K keys
local place, shed = ARGV[5], {}
relief()

local function is_surplus(r)
  local n, nodes = wanted_copies(r)
  for _, node in ipairs(nodes) do
    if node == place then return false end
  end
  local left, on_nodes = 0, 0
  for _, other in ipairs(r.copies.places) do
    if other ~= place then
      left = left + 1
      if other ~= REDIS then on_nodes = on_nodes + 1 end
    end
  end
  return left > 0 and (n == 1 or place == REDIS or on_nodes >= n)
end

for a = 6, #ARGV, 2 do
  local r = load(ARGV[a])
  if has_copy(r, ARGV[a + 1], place) and is_surplus(r) then
    remove_copy(r, place)
    shed[#shed + 1] = r.key
  end
end
finish()
return shed
