-- Add a chunk of tasks to the graph and hold those that the client asks for.
-- LIB         record given notices nodes copies queue tickets settle hold reset
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        5 client          str   who submits
--             6 generation      int   rank of the submission; empty asks for the next one
--             7 notice_limit    int   bytes of a value that a notice may carry
--             8 functions       int   number of (hash, pickled function or empty) pairs that follow
--             9 kinds           int   number of kinds that follow: what many tasks have in common is told once
--            10 ...             pairs; then per kind: function hash, priority, retries, epoch of the client's hold (empty:
--                               it holds it not), constraint or empty, nodes that it prefers or empty; then per task:
--                               key, number of its kind, payload, payload blob token or empty, order, number of deps, deps...
-- RETURNS     {generation, tickets to send}
-- ERRORS      UNKNOWN_CLIENT    its lease ran out
--             UNKNOWN_FUNCTION  no code given nor stored for a hash
--             UNKNOWN_DEPENDENCY  neither a record nor earlier in the chunk
-- INVARIANTS  an error writes nothing; a task does not depend on inputs that it is given; the first record of a key
--             wins; what nobody wants is forgotten again
-- COST        O(T + D): T tasks and D dependencies in the chunk
local client, generation, notice_limit = ARGV[5], ARGV[6], tonumber(ARGV[7])
if not is_known_client(client) then return redis.error_reply('UNKNOWN_CLIENT ' .. client) end

local at = 10
for _ = 1, tonumber(ARGV[8]) do
  local hash, code = ARGV[at], ARGV[at + 1]
  at = at + 2
  if redis.call('HEXISTS', P .. K.functions, hash) == 0 then
    if code == '' then return redis.error_reply('UNKNOWN_FUNCTION ' .. hash) end
    new_functions[hash] = code
  end
end

-- A call that is repeated writes its blobs again: the record may be the one that names it.
local function keep_payload_again(r, token)
  if has_flag(r, L.payload_blob) and extra(r, F.payload_blob) == token then keep_blob(token, r.key) end
end

local kinds = {}
for i = 1, tonumber(ARGV[9]) do
  kinds[i] = {fn = ARGV[at], priority = ARGV[at + 1], retries = ARGV[at + 2], epoch = ARGV[at + 3],
    constraint = ARGV[at + 4], prefer = ARGV[at + 5]}
  at = at + 6
end

local tasks, in_chunk, names = {}, {}, {}
while at <= #ARGV do
  local key, kind, n_deps, deps = ARGV[at], kinds[numbers[ARGV[at + 1]]], numbers[ARGV[at + 5]], false
  if kind.fn == '' then return redis.error_reply('UNKNOWN_FUNCTION of ' .. key) end
  if n_deps > 0 then
    deps = {}
    for i = 1, n_deps do deps[i] = ARGV[at + 5 + i] end   -- not unpack: it has no room for thousands
    for _, dep in ipairs(deps) do
      if not in_chunk[dep] and not find_input(dep) then
        return redis.error_reply('UNKNOWN_DEPENDENCY ' .. dep .. ' of ' .. key)
      end
    end
  end
  in_chunk[key] = true
  local n, name = #tasks + 1, P .. K.task .. key
  names[n], tasks[n] = name, {at = at, key = key, name = name, kind = kind, deps = deps, standing = false}
  at = at + 6 + n_deps
end

local n_known = 0
for i = 1, #names, 2000 do n_known = n_known + redis.call('EXISTS', unpack(names, i, math.min(i + 1999, #names))) end

-- Checked; from here on only writes.
if generation == '' then generation = redis.call('HINCRBY', KEYS[1], M.submissions, 1) end
local reply_generation, rerun = tonumber(generation), {}
generation = string.format('%010x', generation)
for _, task in ipairs(tasks) do
  local a, key, kind = task.at, task.key, task.kind
  local r = records[key] or n_known > 0 and load(key)
  local known = r
  if not r then
    local fn, blob, priority, rank = kind.fn, ARGV[a + 3], kind.priority, string.format('%s%06x', generation, ARGV[a + 4])
    r = {key = key, name = task.name, state = 'released', needed = 0, waiting = 0, attempt = '', flags = '', holders = '',
      recipe = rank .. ' ' .. priority .. ' ' .. fn, rank = rank, priority = priority, fn = fn}
    records[key] = r
    touch(r)
    if blob == '' then write_both_along(r, F.recipe, r.recipe, F.payload, ARGV[a + 2])
    else
      write_both_along(r, F.recipe, r.recipe, F.payload_blob, blob)
      add_flag(r, L.payload_blob)
    end
    count_function(fn, 1)
    if blob ~= '' then keep_blob(blob, key) end
    if kind.retries ~= '0' then write_along(r, F.retries, kind.retries) end
    if kind.constraint ~= '' then
      r.constraint = kind.constraint
      write_along(r, F.constraint, r.constraint)
      add_flag(r, L.constraint)
      count_constraint(r.constraint, 1)
    end
    if kind.prefer ~= '' then
      write_along(r, F.prefer, kind.prefer)
      add_flag(r, L.prefer)
    end
    r.deps = task.deps and give_inputs(r, task.deps, in_chunk)
    if r.deps then
      r.deps_text = table.concat(r.deps, '\n')
      write_along(r, F.deps, r.deps_text)
      for _, dep in ipairs(r.deps) do add_dependent(load(dep), key) end
    end
  end
  if known then
    if ARGV[a + 3] ~= '' then keep_payload_again(r, ARGV[a + 3]) end
    if r.state == 'erred' and r.holders == '' then rerun[#rerun + 1] = r end
  end
  if kind.epoch ~= '' then
    take_hold(client, kind.epoch, r)
    task.standing = known
  end
end
flush_holds(client)

-- An error that nobody holds, nor a task that it took down, is of the past: the task runs again.
for _, r in ipairs(rerun) do
  local blamed = false
  for _, name in ipairs(dependents_of(r)) do
    local d = load(name)
    if d and d.state == 'erred' then blamed = true end
  end
  if r.state == 'erred' and not blamed then reset_errors({r.key}) end
end
-- How a key stands is told before anything moves: what settles then is told to all its holders.
for _, task in ipairs(tasks) do
  if task.standing then note_standing(client, load(task.key), task.kind.epoch, notice_limit) end
end
for _, task in ipairs(tasks) do settle(task.key) end
return {reply_generation, finish()}
