-- The rule that keeps the graph consistent: settle(key) looks at one task and its neighbours, makes the one
-- local change that is due, and names the neighbours to look at next. A call visits at most `budget` tasks;
-- what is left over goes to {ns}:unsettled, where the coordinator's sweep goes on with it.
-- ARGV[3] budget; ARGV[4] ticket lease, ms.
local budget, ticket_lease = tonumber(ARGV[3]), tonumber(ARGV[4])
local work, queued, head, visits = {}, {}, 1, 0
local ACTIVE = {waiting = true, ready = true, processing = true}

local function settle_later(key)
  if not queued[key] then
    queued[key] = true
    work[#work + 1] = key
  end
end

-- The task is no longer active: its inputs are needed once less.
local function let_go_of_deps(r)
  if not r.deps_text then return end
  local deps = deps_of(r)
  for i = 1, #deps do
    local d = load(deps[i])
    add_needed(d, -1)
    if d.needed == 0 then settle_later(deps[i]) end
  end
end

-- Take an active task out of its queue or slot. A running attempt is void as soon as the state is another.
local function withdraw(r)
  if r.state == 'ready' then dequeue(r)
  elseif r.state == 'processing' then disown(extra(r, F.owner), r.key)
  else r.waiting = 0 end
end

local function let_go_of_contained(r)
  if not has_flag(r, L.contains) then return end
  for _, inner in ipairs(split(extra(r, F.contains))) do
    local c = load(inner)
    if c and remove_holder(c, '@' .. r.key) then settle_later(inner) end
  end
  redis.call('HDEL', r.name, F.contains)
  remove_flag(r, L.contains)
end

-- The result goes, with all copies. What the record says of it stays until clear_data; mostly the record goes too.
local function drop_data(r)
  remove_copies(r)
  let_go_of_contained(r)
  r.data_dropped = true
  set_state(r, r.recipe and 'released' or 'lost')
end

local function clear_data(r)
  r.data_dropped, r.along = nil, nil
  redis.call('HDEL', r.name, F.value, F.result)
end

local function forget(r)
  if has_flag(r, L.payload_blob) then drop_blob(extra(r, F.payload_blob), r.key) end
  if has_flag(r, L.constraint) then count_constraint(signature_of(r), -1) end
  forgotten[#forgotten + 1] = r.name
  if r.recipe then count_function(function_of(r), -1) end
  records[r.key] = false
  if not r.deps_text then return end
  for _, dep in ipairs(deps_of(r)) do
    redis.call('HDEL', P .. K.dependents .. dep, r.key)
    settle_later(dep)
  end
end

-- Err a task and, transitively, the tasks that wait for it.
local function err(r, blame)
  local stack = {r}
  while #stack > 0 do
    local q = table.remove(stack)
    if q.state ~= 'erred' then
      withdraw(q)
      set_state(q, 'erred')
      q.blame = blame
      redis.call('HSET', q.name, F.blame, blame)
      notify(q, 'e', error_of(blame))
      visits = visits + 1
      if q.needed > 0 then
        for _, name in ipairs(dependents_of(q)) do
          if visits + #stack > budget then settle_later(name)
          else
            local d = load(name)
            if d.state == 'waiting' then stack[#stack + 1] = d end
          end
        end
      end
      let_go_of_deps(q)
      settle_later(q.key)
    end
  end
end

-- The blamed key if a dependency of r cannot be had, else nil; second, how many are not in memory.
local function missing_deps(r)
  local blame, missing = nil, 0
  for _, dep in ipairs(deps_of(r)) do
    local d = load(dep)
    if d.state ~= 'memory' then
      missing = missing + 1
      if d.state == 'erred' then blame = d.blame or extra(d, F.blame)
      elseif d.state == 'lost' then blame = dep end
    elseif has_flag(d, L.replicas) then add_flag(r, L.near) end
  end
  return blame, missing
end

-- A task that was to run does not run now. It is ready again, or waits, as inputs may have been lost meanwhile.
local function requeue(r)
  if not r.deps_text then
    enqueue(r)
    return
  end
  local blame, missing = missing_deps(r)
  if missing == 0 then enqueue(r)
  else
    set_state(r, 'waiting')
    r.waiting = missing
    if blame then err(r, blame) end
  end
end

-- A released task is wanted: it will be made again, after those of its inputs that are not in memory.
local function raise(r)
  if not r.deps_text then
    enqueue(r)
    return
  end
  local blame, missing = missing_deps(r)
  set_state(r, 'waiting')
  r.waiting = missing
  for _, dep in ipairs(deps_of(r)) do
    local d = load(dep)
    add_needed(d, 1)
    if d.state == 'released' then settle_later(dep) end
  end
  if blame then err(r, blame)
  elseif missing == 0 then enqueue(r) end
end

local function settle(key)
  local r = load(key)
  if not r then return end
  if is_wanted(r) then
    if r.state == 'released' then raise(r)
    elseif r.state == 'waiting' then
      local blame = missing_deps(r)
      if blame then err(r, blame) end
    end
    return
  end
  want_no_copies(r)
  if ACTIVE[r.state] then
    withdraw(r)
    set_state(r, 'released')
    let_go_of_deps(r)
  elseif r.state == 'memory' then drop_data(r) end
  if not has_dependents(r) then forget(r)
  elseif r.data_dropped then clear_data(r) end
end

-- The result of r is there: wake what waits for it, let go of what it was made from. The caller withdrew r
-- from its queue or slot. `data` is a value, or else the token of the copy that `maker` made at `place`.
local function enter_memory(r, nbytes, type_name, kind, data, contains, maker, place)
  local is_value = kind == 'v'
  local was_active = ACTIVE[r.state]
  r.waiting = 0
  set_state(r, 'memory')
  write_along(r, F.result, nbytes .. ' ' .. type_name)
  if is_value then write_along(r, F.value, data) else begin_copies(r, data, maker, nbytes, place) end
  if contains ~= '' then
    redis.call('HSET', r.name, F.contains, contains)
    add_flag(r, L.contains)
    for _, inner in ipairs(split(contains)) do
      local c = load(inner)
      if c then
        add_holder(c, '@' .. r.key, 0)
        settle_later(inner)
      end
    end
  end
  if r.needed > 0 then
    for _, name in ipairs(dependents_of(r)) do
      local d = load(name)
      if d.state == 'waiting' then
        if not is_value then add_flag(d, L.near) end
        d.waiting = d.waiting - 1
        if d.waiting == 0 then enqueue(d) else touch(d) end
      end
    end
  end
  if was_active then let_go_of_deps(r) end
end

local function run_settle()
  while head <= #work do
    if visits >= budget then break end
    visits = visits + 1
    local key = work[head]
    head = head + 1
    queued[key] = nil
    settle(key)
  end
  for i = head, #work do redis.call('SADD', P .. K.unsettled, work[i]) end
  work, head = {}, 1
end

-- The end of every script that changes the graph: settle, write, tell, call slots. Returns tickets to send.
local function finish()
  run_settle()
  flush_records()
  flush_copies()
  flush_notices()
  flush_queues()
  return call_slots(ticket_lease)
end
