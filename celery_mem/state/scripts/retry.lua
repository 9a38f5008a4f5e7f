-- Run erred tasks again, with the erred inputs behind them and everything those took down.
-- LIB         record notices nodes copies queue tickets settle reset
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        5 client          str
--             6 ...             keys; those that are not erred are passed over
-- RETURNS     {keys whose error is cleared and that the client holds, tickets to send}
-- INVARIANTS  errors are cleared up to their origin, and down to every task they reached
-- COST        O(erred tasks reached and their dependencies)
local client, keys, held = ARGV[5], {}, {}
for i = 6, #ARGV do keys[#keys + 1] = ARGV[i] end
for _, r in ipairs(reset_errors(keys)) do
  if has_holder(r, client) then held[#held + 1] = r.key end
end
return {held, finish()}
