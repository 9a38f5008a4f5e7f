-- Run erred tasks again, with the erred inputs behind them and everything those took down.
-- LIB         record notices nodes copies queue tickets settle reset
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        5 ...             keys; those that are not erred are passed over
-- RETURNS     tickets to send
-- INVARIANTS  errors are cleared up to their origin, and down to every task they reached
-- COST        O(erred tasks reached and their dependencies)
local keys = {}
for i = 5, #ARGV do keys[#keys + 1] = ARGV[i] end
reset_errors(keys)
return finish()
