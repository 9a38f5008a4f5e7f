-- Given inputs, as GIVEN in keys.py says: those that are there and small when a task is submitted become part of it.
-- Most small tasks then have no dependency left to be counted, looked up and let go of.
local LARGEST_GIVEN, MOST_GIVEN = 512, 4096      -- bytes of one value, and of all of a task

local small_values = {}

-- Whether an input has a record. Its value is noted if it may be given: what contains futures keeps them alive, so it has
-- to stay. Most others are looked at no more.
local function find_input(key)
  local r = records[key] or small_values[key]
  if r ~= nil then return r end
  local name = P .. K.task .. key
  local value = redis.call('HGET', name, F.value)
  if value and #value <= LARGEST_GIVEN then
    local flags = string.match(redis.call('HGET', name, F.core) or '', '^%a+ %d+ %d+ %d* (%a*)\n')
    if flags and (flags == '' or not string.find(flags, L.contains, 1, true)) then
      small_values[key] = value
      return true
    end
  end
  return load(key)
end

-- Give a new task what can be given, and is not `new` itself; returns the keys that it depends on, nil if there are none.
local function give_inputs(r, keys, new)
  local given, deps, room = {}, {}, MOST_GIVEN
  for place, key in ipairs(keys) do
    local value = not new[key] and small_values[key]
    if value and #value <= room then
      room = room - #value
      given[#given + 1] = digits[place] .. ' ' .. digits[#value] .. ' ' .. key .. '\n' .. value
    else deps[#deps + 1] = key end
  end
  if #given > 0 then write_along(r, F.given, table.concat(given)) end
  return #deps > 0 and deps or nil
end

-- Place -> {key, value} of given inputs, and their number.
local function read_given(text)
  local found, n, at = {}, 0, 1
  while at <= #text do
    local place, nbytes, key, start = string.match(text, '^(%d+) (%d+) ([^\n]*)\n()', at)
    if not place then break end      -- unreadable: the worker finds inputs lacking
    at = start + nbytes
    found[numbers[place]] = {key = key, value = string.sub(text, start, at - 1)}
    n = n + 1
  end
  return found, n
end
