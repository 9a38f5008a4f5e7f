-- Task records: read once per script call. What changes with most transitions is one field, `core`: it changes in memory
-- (touch) and is written once at the end; what changes with one transition only is written by that transition.
-- Whoever follows a name out of a record may find none there, or one that is not as we write it, if somebody else
-- writes to this Redis, or it evicts: such a record is no record, an input without one is lost, and the call goes on.
local records, touched = {}, {}

local function split(text)
  local out = {}
  if not text or text == '' then return out end
  local n, at, line_end = 0, 1, string.find(text, '\n', 1, true)
  while line_end do
    n = n + 1
    out[n] = string.sub(text, at, line_end - 1)
    at = line_end + 1
    line_end = string.find(text, '\n', at, true)
  end
  out[n + 1] = string.sub(text, at)
  return out
end

-- Numbers as texts and back: to print or read one takes as long as a short command.
local digits = setmetatable({}, {__index = function(known, n)
  local text = string.format('%d', n)
  known[n] = text
  return text
end})
local numbers = setmetatable({}, {__index = function(known, text)
  local n = tonumber(text)
  known[text] = n
  return n
end})

-- The field `core`, as CORE in keys.py says.
local function core_of(r)
  return r.state .. ' ' .. digits[r.needed] .. ' ' .. digits[r.waiting] .. ' ' .. r.attempt .. ' ' .. r.flags
    .. '\n' .. r.holders
end

-- What the field `recipe` says, as RECIPE in keys.py tells: looked at by few transitions.
local function read_recipe(r)
  r.rank, r.priority, r.fn = string.match(r.recipe, '^(%x+) (%S+) (.*)$')
  if not tonumber(r.priority or '') then r.rank, r.priority, r.fn = string.rep('f', 16), '0', '' end      -- unreadable: the worker says so
end

local function rank_of(r)
  if not r.rank then read_recipe(r) end
  return r.rank
end

local function priority_of(r)
  if not r.priority then read_recipe(r) end
  return r.priority
end

-- The hash of the function, nil for scattered data.
local function function_of(r)
  if not r.fn and r.recipe then read_recipe(r) end
  return r.fn
end

local function note_record(key, name, core, recipe, deps_text)
  if not core then
    records[key] = false
    return false
  end
  local state, needed, waiting, attempt, flags, at = string.match(core, '^(%a+) (%d+) (%d+) (%d*) (%a*)\n()')
  if not state then
    records[key] = false
    return false
  end
  local r = {key = key, name = name, state = state, needed = numbers[needed], waiting = numbers[waiting], attempt = attempt,
    flags = flags, holders = string.sub(core, at), recipe = recipe, deps_text = deps_text}
  records[key] = r
  return r
end

-- The record of key, or false. Holds what most transitions look at; extra() reads the rest.
local function load(key)
  local r = records[key]
  if r ~= nil then return r end
  local name = P .. K.task .. key
  local v = redis.call('HMGET', name, F.core, F.recipe, F.deps)
  return note_record(key, name, v[1], v[2], v[3])
end

-- The same, and up to two further fields.
local function load_with(key, ...)
  local r = records[key]
  if r then
    local v = redis.call('HMGET', r.name, ...)
    return r, v[1], v[2]
  end
  local name = P .. K.task .. key
  local v = redis.call('HMGET', name, F.core, F.recipe, F.deps, ...)
  return note_record(key, name, v[1], v[2], v[3]), v[4], v[5]
end

-- Fields to be written along with the core: field, value, field, value, ...
local function write_along(r, field, value)
  local along = r.along
  if not along then
    along = {}
    r.along = along
  end
  local n = #along
  along[n + 1], along[n + 2] = field, value
end

-- The same of two, as most records have: a list that is made at once need not grow.
local function write_both_along(r, field, value, other_field, other_value)
  if not r.along then r.along = {field, value, other_field, other_value}
  else
    write_along(r, field, value)
    write_along(r, other_field, other_value)
  end
end

local function extra(r, field)
  local along = r.along
  if along then
    for i = 1, #along, 2 do
      if along[i] == field then return along[i + 1] end
    end
  end
  return redis.call('HGET', r.name, field)
end

local function has_flag(r, flag) return r.flags ~= '' and string.find(r.flags, flag, 1, true) end

-- A blob is written with a time to live; the record that names it takes that away.
local function blob_name(token, key) return P .. K.blob .. token .. ':' .. key end
local function keep_blob(token, key) redis.call('PERSIST', blob_name(token, key)) end
local function has_blob(token, key) return redis.call('EXISTS', blob_name(token, key)) == 1 end
local function drop_blob(token, key) redis.call('UNLINK', blob_name(token, key)) end

-- Call a command with a name and the rest of its arguments, a part at a time where unpack has no room for all.
local function call_in_parts(command, args, name)
  for i = 1, #args, 2000 do redis.call(command, name, unpack(args, i, math.min(i + 1999, #args))) end
end

local function deps_of(r)
  local deps = r.deps
  if not deps then
    deps = split(r.deps_text)
    r.deps = deps
  end
  return deps
end

-- Have the core of the record written at the end.
local function touch(r)
  if r.dirty then return end
  r.dirty = true
  touched[#touched + 1] = r
end

local function add_flag(r, flag)
  if has_flag(r, flag) then return end
  r.flags = r.flags .. flag
  touch(r)
end

local function remove_flag(r, flag)
  r.flags = string.gsub(r.flags, flag, '')
  touch(r)
end

local function set_state(r, state)
  r.state = state
  touch(r)
end

local function add_needed(r, n)
  r.needed = r.needed + n
  touch(r)
end

-- Holders are lines "id epoch"; most tasks have one.
local function add_holder(r, id, epoch)
  r.holders = (r.holders == '' and '' or r.holders .. '\n') .. id .. ' ' .. epoch
  touch(r)
end

-- Iterates over id, epoch.
local function holders_of(r) return string.gmatch(r.holders, '([^\n]+) (%d+)') end

-- Whether a holder is a client, and not "@key", a result; "!", a run to the end; or "#token", a dataset.
local function is_client(id)
  local first = string.byte(id)
  return first > 35 and first ~= 64      -- '!' and '#', then '@'
end

local function has_holder(r, id)
  for holder in holders_of(r) do
    if holder == id then return true end
  end
  return false
end

local function remove_holder(r, id)
  if r.holders == '' then return false end
  local before, after = string.find(r.holders, id .. ' ', 1, true)
  if before == 1 and string.find(r.holders, '^%d+$', after + 1) then      -- the only one, as mostly
    r.holders = ''
    touch(r)
    return true
  end
  local text, at = '\n' .. r.holders .. '\n', 1
  while true do
    local from, to = string.find(text, '\n' .. id .. ' ', at, true)
    if not from then return false end
    local line_end = string.match(text, '^%d+()\n', to + 1)     -- else it is a longer id that begins like this one
    if line_end then
      local before, after = string.sub(text, 2, from - 1), string.sub(text, line_end + 1, -2)
      r.holders = before .. (before ~= '' and after ~= '' and '\n' or '') .. after
      touch(r)
      return true
    end
    at = to
  end
end

local function is_wanted(r) return r.needed > 0 or r.holders ~= '' end

-- Invariant: a record without the flag has no dependents.
local function add_dependent(r, key)
  redis.call('HSET', P .. K.dependents .. r.key, key, '')
  add_flag(r, L.known)
end

local function has_dependents(r)
  return has_flag(r, L.known) and redis.call('EXISTS', P .. K.dependents .. r.key) == 1
end

local function dependents_of(r)
  return has_flag(r, L.known) and redis.call('HKEYS', P .. K.dependents .. r.key) or {}
end

-- Function hashes whose number of records changes in this call, and code that came with it.
local function_delta, new_functions = {}, {}
local function count_function(hash, n) function_delta[hash] = (function_delta[hash] or 0) + n end

-- The constraint of a task, '' if it has none. Constraints whose number of records changes in this call.
local constraint_delta = {}
local function signature_of(r)
  if not has_flag(r, L.constraint) then return '' end
  r.constraint = r.constraint or extra(r, F.constraint)
  return r.constraint
end
local function count_constraint(signature, n) constraint_delta[signature] = (constraint_delta[signature] or 0) + n end

-- Slot -> keys that it owns no longer.
local disowned = {}
local function disown(slot, key)
  local keys = disowned[slot]
  if not keys then
    keys = {}
    disowned[slot] = keys
  end
  keys[#keys + 1] = key
end

-- Records that are gone.
local forgotten = {}

local function write_record(r)
  local along = r.along
  if not along then redis.call('HSET', r.name, F.core, core_of(r))
  else
    r.along = nil
    redis.call('HSET', r.name, F.core, core_of(r), unpack(along))
  end
end

local function flush_records()
  for slot, keys in pairs(disowned) do
    for i = 1, #keys, 2000 do
      redis.call('HDEL', P .. K.slot .. slot, unpack(keys, i, math.min(i + 1999, #keys)))
    end
  end
  for i = 1, #forgotten, 2000 do redis.call('UNLINK', unpack(forgotten, i, math.min(i + 1999, #forgotten))) end
  for i = 1, #touched do
    local r = touched[i]
    r.dirty = nil
    if records[r.key] == r then write_record(r) end
  end
  for hash, n in pairs(function_delta) do
    if n ~= 0 and redis.call('HINCRBY', P .. K.functions, hash, n) <= 0 then
      redis.call('HDEL', P .. K.functions, hash)
      redis.call('UNLINK', P .. K.function .. hash)
    elseif n > 0 and new_functions[hash] then
      redis.call('SET', P .. K.function .. hash, new_functions[hash])
    end
  end
  for signature, n in pairs(constraint_delta) do
    if n ~= 0 and redis.call('HINCRBY', P .. K.constraints, signature, n) <= 0 then
      redis.call('HDEL', P .. K.constraints, signature)
      redis.call('HDEL', P .. K.unrunnable, signature)
    end
  end
  forgotten, touched, disowned, function_delta, constraint_delta = {}, {}, {}, {}, {}
end
