-- Have tasks run to their end though nobody holds them any more (fire and forget).
-- LIB         record notices nodes copies queue tickets settle
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        5 ...             keys
-- RETURNS     keys without a record
-- INVARIANTS  a holder of its own, "!", keeps such a task, and goes in the script that ends it; one that ended is left
--             alone, but of its error there is word (twice if this is repeated)
-- COST        O(K): K keys
local unknown = {}
for i = 5, #ARGV do
  local r = load(ARGV[i])
  if not r then unknown[#unknown + 1] = ARGV[i]
  elseif not has_flag(r, L.forgotten) and (ACTIVE[r.state] or r.state == 'released') then
    add_holder(r, '!', 0)
    add_flag(r, L.forgotten)
    redis.call('SADD', P .. K.held .. '!', r.key)
    settle_later(r.key)
  elseif r.state == 'erred' then end_forgotten(r, extra(r, F.blame))
  end
end
finish()
return unknown
