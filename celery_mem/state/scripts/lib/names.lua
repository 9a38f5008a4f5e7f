-- Names: a client with a name and a lease of its own can come back under it; see claim_name.lua.
-- Clients that lost their names to this one, which is to take over what they hold.
local function inheritances(client)
  local found, all = {}, redis.call('HGETALL', P .. K.heirs)
  for i = 1, #all, 2 do
    if all[i + 1] == client then found[#found + 1] = all[i] end
  end
  return found
end

