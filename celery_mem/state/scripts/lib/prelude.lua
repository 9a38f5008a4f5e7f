-- Every script begins here: who we are, whether the namespace is the one the caller joined, and the time.
-- KEYS[1] is always {ns}:meta; all other keys share its hash tag and are derived from it.
-- ARGV[1] generation id that the caller joined; ARGV[2] the time in ms, empty for the server's.
local P = string.sub(KEYS[1], 1, -5)
if redis.call('HGET', KEYS[1], M.generation) ~= ARGV[1] then
  return redis.error_reply('NAMESPACE_RESET the namespace is not the one joined')
end
local clock = tonumber(ARGV[2])
local function now()
  if not clock then
    local t = redis.call('TIME')
    clock = t[1] * 1000 + math.floor(t[2] / 1000)
  end
  return clock
end
