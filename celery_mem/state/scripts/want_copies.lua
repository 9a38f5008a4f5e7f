-- Say how many copies of keys are wanted, and where; the coordinator makes them.
-- LIB         record notices nodes copies queue tickets settle
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        5 copies          int   nodes that are to have one
--             6 nodes           str   nodes of which each is to have one, joined by newlines
--             7 ...             keys
-- RETURNS     keys without a record
-- INVARIANTS  it holds until the key is not wanted any more, through losses as well; 1 and no nodes takes it back
-- COST        O(K): K keys
local n, nodes, unknown = ARGV[5], ARGV[6], {}
for i = 7, #ARGV do
  local r = load(ARGV[i])
  if not r then unknown[#unknown + 1] = ARGV[i]
  elseif n == '1' and nodes == '' then want_no_copies(r)
  elseif is_wanted(r) then want_copies(r, n, nodes) end
end
finish()
return unknown
