-- Drop copies that are not needed.
-- LIB         record notices nodes copies queue tickets settle relief
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        5 place           str   node, or @redis
--             6 ...             pairs: key, token
-- RETURNS     keys whose copy there is dropped: at once, or by the agent of its node, which has mail
-- INVARIANTS  one copy stays, and as many on nodes as were asked for; a node that was named keeps its copy; a durable
--             result stays durable; works when Redis is full
-- COST        O(K): K keys
local place, shed = ARGV[5], {}
relief()

local function is_surplus(r)
  local n, nodes = wanted_copies(r)
  for _, node in ipairs(nodes) do
    if node == place then return false end
  end
  local left, on_nodes, durable = 0, 0, 0
  for _, other in ipairs(r.copies.places) do
    if other ~= place then
      left = left + 1
      if outlives_nodes(other) then durable = durable + 1 else on_nodes = on_nodes + 1 end
    end
  end
  if outlives_nodes(place) and durable == 0 and has_flag(r, L.durable) then return false end
  return left > 0 and (n == 1 or outlives_nodes(place) or on_nodes >= n)
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
