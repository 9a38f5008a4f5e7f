-- Add a chunk of tasks to the graph and hold those that the client asks for.
-- LIB         record given notices nodes copies queue tickets settle hold reset
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        5 client          str   who submits
--             6 generation      int   rank of the submission; empty asks for the next one
--             7 notice_limit    int   bytes of a value that a notice may carry
--             8 functions       int   number of (hash, pickled function or empty) pairs that follow
--             9 ...             pairs, then per task: key, function hash, payload, payload blob token or
--                               empty, priority, order, retries, epoch of the client's hold (empty: it holds it
--                               not), constraint or empty, nodes that it prefers or empty, number of deps, deps...
-- RETURNS     {generation, tickets to send}
-- ERRORS      UNKNOWN_CLIENT    its lease ran out
--             UNKNOWN_FUNCTION  no code given nor stored for a hash
--             UNKNOWN_DEPENDENCY  neither a record nor earlier in the chunk
-- INVARIANTS  an error writes nothing; a task does not depend on inputs that it is given; the first record of a key
--             wins; what nobody wants is forgotten again
-- COST        O(T + D): T tasks and D dependencies in the chunk
local client, generation, notice_limit = ARGV[5], ARGV[6], tonumber(ARGV[7])
if not is_known_client(client) then return redis.error_reply('UNKNOWN_CLIENT ' .. client) end

local at = 9
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

local tasks, in_chunk, names = {}, {}, {}
while at <= #ARGV do
  local key, n_deps, deps = ARGV[at], tonumber(ARGV[at + 10]), false
  if ARGV[at + 1] == '' then return redis.error_reply('UNKNOWN_FUNCTION of ' .. key) end
  if n_deps > 0 then
    deps = {}
    for i = 1, n_deps do deps[i] = ARGV[at + 10 + i] end   -- not unpack: it has no room for thousands
    for _, dep in ipairs(deps) do
      if not in_chunk[dep] and not find_input(dep) then
        return redis.error_reply('UNKNOWN_DEPENDENCY ' .. dep .. ' of ' .. key)
      end
    end
  end
  in_chunk[key] = true
  local n, name = #tasks + 1, P .. K.task .. key
  names[n], tasks[n] = name, {at = at, key = key, name = name, deps = deps, standing = false}
  at = at + 11 + n_deps
end

local n_known = 0
for i = 1, #names, 2000 do n_known = n_known + redis.call('EXISTS', unpack(names, i, math.min(i + 1999, #names))) end

-- Checked; from here on only writes.
if generation == '' then generation = redis.call('HINCRBY', KEYS[1], M.submissions, 1) end
local reply_generation, rerun = tonumber(generation), {}
generation = string.format('%010x', generation)
for _, task in ipairs(tasks) do
  local a, key = task.at, task.key
  local r = records[key] or n_known > 0 and load(key)
  local known = r
  if not r then
    local fn, blob, priority, rank = ARGV[a + 1], ARGV[a + 3], ARGV[a + 4], string.format('%s%06x', generation, ARGV[a + 5])
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
    if ARGV[a + 6] ~= '0' then write_along(r, F.retries, ARGV[a + 6]) end
    if ARGV[a + 8] ~= '' then
      r.constraint = ARGV[a + 8]
      write_along(r, F.constraint, r.constraint)
      add_flag(r, L.constraint)
      count_constraint(r.constraint, 1)
    end
    if ARGV[a + 9] ~= '' then
      write_along(r, F.prefer, ARGV[a + 9])
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
  if ARGV[a + 7] ~= '' then
    take_hold(client, ARGV[a + 7], r)
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
  if task.standing then note_standing(client, load(task.key), ARGV[task.at + 7], notice_limit) end
end
for _, task in ipairs(tasks) do settle(task.key) end
return {reply_generation, finish()}
