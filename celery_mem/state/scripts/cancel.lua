-- Drop a client's holds on keys and on everything that depends on them.
-- LIB         record notices nodes copies queue tickets settle hold relief
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        5 client          str
--             6 force           0|1   drop every client's holds; the others are told
--             7 reason          str   for the others' error text
--             8 ...             keys
-- RETURNS     {keys on which this client's hold was dropped, tickets to send}
-- INVARIANTS  without force, what another client holds stays, and with it its inputs; the agent of a slot that runs what
--             may be wanted no more has a letter of it, and looks for itself when that is so
-- COST        O(dependents of the keys)
local client, force, reason = ARGV[5], ARGV[6] == '1', ARGV[7]
relief()
local stack, seen, cancelled = {}, {}, {}
for i = 8, #ARGV do stack[#stack + 1] = ARGV[i] end
while #stack > 0 do
  local key = table.remove(stack)
  local r = not seen[key] and load(key)
  seen[key] = true
  if r then
    if drop_hold(client, key) then cancelled[#cancelled + 1] = key end
    if force then
      notify(r, 'c', reason)
      for holder in holders_of(r) do
        if holder == '!' then remove_flag(r, L.forgotten) end
        if string.byte(holder) ~= 64 then      -- '@', a result, which keeps what it contains
          remove_holder(r, holder)
          drop_from_index(holder, {key})
        end
      end
    end
    if force or r.holders == '' then
      if r.state == 'processing' then
        local slot = extra(r, F.owner)
        local node = node_of_slot(slot)
        if node_of(node) then write_to(node, 'x ' .. slot .. ' ' .. r.attempt .. ' ' .. key) end
      end
      for _, name in ipairs(dependents_of(r)) do stack[#stack + 1] = name end
    end
    settle_later(key)
  end
end
drop_from_index(client, cancelled)
return {cancelled, finish()}
