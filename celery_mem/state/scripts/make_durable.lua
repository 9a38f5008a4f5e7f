-- Have results outlive all nodes: written to Redis or to a durable file as soon as they are there.
-- LIB         record notices nodes copies queue tickets settle
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        5 ...             keys
-- RETURNS     {keys without a record, tickets to send}
-- INVARIANTS  what is durable has no lineage, and stays in memory while records depend on it; what is to be and is in
--             memory without being so is in `undurable`, and a node with a copy has mail
-- COST        O(K + D): K keys, D dependencies of them
local unknown = {}
for i = 5, #ARGV do
  local r = load(ARGV[i])
  if not r then unknown[#unknown + 1] = ARGV[i]
  else
    add_flag(r, L.durable)
    see_durable(r)
  end
end
return {unknown, finish()}
