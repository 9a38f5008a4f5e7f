-- Forget the errors of some tasks, of the erred inputs behind them and of everything those took down,
-- so that they are made again where they are wanted. Returns their records.
local function reset_errors(keys)
  local seen, up, down = {}, {}, {}
  for _, key in ipairs(keys) do up[#up + 1] = key end
  while #up > 0 do
    local r = load(table.remove(up))
    if r and r.state == 'erred' and not seen[r.key] then
      seen[r.key] = true
      down[#down + 1] = r
      for _, dep in ipairs(deps_of(r)) do up[#up + 1] = dep end
    end
  end
  local at = 1
  while at <= #down do
    local r = down[at]
    at = at + 1
    for _, name in ipairs(dependents_of(r)) do
      local d = load(name)
      if d and d.state == 'erred' and not seen[name] then
        seen[name] = true
        down[#down + 1] = d
      end
    end
  end
  for _, r in ipairs(down) do
    set_state(r, 'released')
    r.blame, r.is_retried = nil, true
    redis.call('HDEL', r.name, F.error, F.blame)
    notify(r, 'p')
    settle_later(r.key)
  end
  return down
end
