-- The rule that keeps the graph consistent: settle(key) looks at one task and its neighbours, makes the one
-- local change that is due, and names the neighbours to look at next. A call visits at most `budget` tasks;
-- what is left over goes to {ns}:unsettled, where the coordinator's sweep goes on with it.
-- ARGV[3] budget; ARGV[4] ticket lease, ms.
local budget, ticket_lease = tonumber(ARGV[3]), tonumber(ARGV[4])
local work, queued, head, visits = {}, {}, 1, 0
local n_freed, n_remade = 0, 0
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
    if d and d.needed > 0 then
      add_needed(d, -1)
      if d.needed == 0 then settle_later(deps[i]) end
    end
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

-- A task that runs for nobody has ended: nobody holds it any more. There is word of its error, which is blamed on `blame`.
local function end_forgotten(r, blame)
  if blame then
    redis.call('RPUSH', P .. K.failures, r.key .. '\n' .. blame .. '\n' .. error_of(blame))
    redis.call('LTRIM', P .. K.failures, -1000, -1)      -- without a coordinator nobody reads it
  end
  remove_flag(r, L.forgotten)
  remove_holder(r, '!')
  redis.call('SREM', P .. K.held .. '!', r.key)
  settle_later(r.key)
end

-- Whether a result that is to outlive all nodes does: it is a value in its record, a blob, or a durable file.
local function is_durable(r)
  if not has_flag(r, L.durable) or r.state ~= 'memory' then return false end
  local copies = copies_of(r)
  for _, place in ipairs(copies and copies.places or {}) do
    if outlives_nodes(place) then return true end
  end
  return not copies
end

-- Something changed about a result that is to be durable. If it is, the record gives up how it is made, and is like that
-- of scattered data from here on: a chain which runs for weeks does not grow without bound. Else a node is asked for a copy.
local function see_durable(r)
  if not has_flag(r, L.durable) or r.state ~= 'memory' then return end
  if not is_durable(r) then
    local first
    for _, place in ipairs(r.copies.places) do
      if not first or place < first then first = place end
    end
    redis.call('SADD', P .. K.undurable, r.key)
    write_to(first, 'k ' .. r.copies.token .. ' ' .. r.key)
    return
  end
  redis.call('SREM', P .. K.undurable, r.key)
  if not r.recipe then return end
  if has_flag(r, L.payload_blob) then drop_blob(extra(r, F.payload_blob), r.key) end
  if has_flag(r, L.constraint) then count_constraint(signature_of(r), -1) end
  for _, flag in ipairs({L.payload_blob, L.constraint, L.prefer, L.near}) do remove_flag(r, flag) end
  redis.call('HDEL', r.name, F.recipe, F.payload, F.payload_blob, F.deps, F.given, F.constraint, F.prefer, F.home)
  count_function(function_of(r), -1)
  for _, dep in ipairs(deps_of(r)) do
    redis.call('HDEL', P .. K.dependents .. dep, r.key)
    settle_later(dep)
  end
  r.recipe, r.fn, r.rank, r.priority, r.deps, r.deps_text, r.home = false, nil, nil, nil, {}, false, false
end

-- The result goes, with all copies. What the record says of it stays until clear_data; mostly the record goes too.
local function drop_data(r)
  remove_copies(r)
  let_go_of_contained(r)
  if r.flags ~= '' and has_flag(r, L.durable) then redis.call('SREM', P .. K.undurable, r.key) end
  r.data_dropped = true
  set_state(r, r.recipe and 'released' or 'lost')
end

-- What was to be written along is the result, if anything: the other fields of such a record are there already.
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
      notify(q, error_notice(blame))
      if has_flag(q, L.forgotten) then end_forgotten(q, blame) end
      visits = visits + 1
      if q.needed > 0 then
        for _, name in ipairs(dependents_of(q)) do
          if visits + #stack > budget then settle_later(name)
          else
            local d = load(name)
            if d and d.state == 'waiting' then stack[#stack + 1] = d end
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
    if not d then
      blame, missing = dep, missing + 1
    elseif d.state ~= 'memory' then
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
  if r.attempt ~= '' and not r.is_retried then n_remade = n_remade + 1 end
  if not r.deps_text then
    enqueue(r)
    return
  end
  local blame, missing = missing_deps(r)
  set_state(r, 'waiting')
  r.waiting = missing
  for _, dep in ipairs(deps_of(r)) do
    local d = load(dep)
    if d then
      add_needed(d, 1)
      if d.state == 'released' then settle_later(dep) end
    end
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
  elseif r.state == 'memory' then
    if not r.recipe and is_durable(r) and has_dependents(r) then
      -- It is all the lineage that its dependents have; nobody needs it on nodes.
      local copies = copies_of(r)
      for _, place in ipairs(copies and copies.places or {}) do
        if not outlives_nodes(place) then remove_copy(r, place) end
      end
      return
    end
    drop_data(r)
    n_freed = n_freed + 1
  end
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
  if is_value then write_both_along(r, F.result, nbytes .. ' ' .. type_name, F.value, data)
  else
    write_along(r, F.result, nbytes .. ' ' .. type_name)
    begin_copies(r, data, maker, nbytes, place)
  end
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
      if d and d.state == 'waiting' then
        if not is_value then add_flag(d, L.near) end
        d.waiting = d.waiting - 1
        if d.waiting == 0 then enqueue(d) else touch(d) end
      end
    end
  end
  if was_active then let_go_of_deps(r) end
  if r.flags ~= '' then
    see_durable(r)
    if has_flag(r, L.forgotten) then end_forgotten(r) end
  end
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
  if n_freed > 0 then redis.call('HINCRBY', P .. K.counts, C.freed, n_freed) end
  if n_remade > 0 then redis.call('HINCRBY', P .. K.counts, C.remade, n_remade) end
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
