-- A coordinator that was deposed while it was away must not write: its term is compared with the current one.
local function check_fence(term)
  if term == '' then return nil end
  local current = redis.call('HGET', KEYS[1], M.fence)
  if current ~= term then
    return redis.error_reply('FENCED term ' .. term .. ' is over, ' .. tostring(current) .. ' leads')
  end
  return nil
end
