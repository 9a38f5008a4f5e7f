-- A full Redis (maxmemory, noeviction) refuses a script whose first write may need memory. One whose first write
-- can only free is let through to its end: call this before any other write where work must go on regardless.
local function relief() redis.call('HDEL', KEYS[1], '') end
