-- Nodes: which are alive, which take tasks, and what a constraint asks of them.
local known_nodes = {}
local DEFAULT_PACE_MS = 5

-- What is known of a live node; false for one that is not alive, or that this call takes off the list.
local function node_of(name)
  local node = known_nodes[name]
  if node == nil then
    node = redis.call('ZSCORE', P .. K.nodes, name) and {} or false
    if node then
      local v = redis.call('HMGET', P .. K.node .. name, N.slots, N.status, N.pace, N.took)
      local status = v[2] or 'running'
      node.slots, node.pace = tonumber(v[1] or 0), tonumber(v[3] or DEFAULT_PACE_MS)
      node.took = tonumber(v[4] or now())
      node.takes = node.slots > 0 and status == 'running'
      node.may_take = node.takes or node.slots > 0 and status == 'paused'      -- it will go on
    end
    known_nodes[name] = node
  end
  return node
end

local function takes_tasks(name)
  local node = node_of(name)
  return node and node.takes
end

local function all_nodes() return redis.call('ZRANGE', P .. K.nodes, 0, -1) end

-- Slots are called <node>|<process>.<number>.
local function node_of_slot(slot) return string.match(slot, '^(.*)|[^|]*$') or '' end

local function slots_of(node) return redis.call('SMEMBERS', P .. K.node_slots .. node) end

-- Constraints are JSON objects: `workers`, nodes or hosts, any if there are none; `resources`, name -> amount.
local constraints = {}
local function constraint_of(signature)
  local constraint = constraints[signature]
  if not constraint then
    constraint = signature == '' and {} or cjson.decode(signature)
    constraints[signature] = constraint
  end
  return constraint
end

local function needs_of(signature) return constraint_of(signature).resources or {} end

local function has_needs(signature) return next(needs_of(signature)) ~= nil end

local function admits(signature, node)
  local workers = constraint_of(signature).workers
  if not workers or #workers == 0 then return true end
  local host = string.match(node, '@(.*)$')
  for _, worker in ipairs(workers) do
    if worker == node or worker == host then return true end
  end
  return false
end

local function fits(signature, amounts)
  for name, amount in pairs(needs_of(signature)) do
    if (amounts[name] or 0) < amount then return false end
  end
  return true
end

local function resources_of(node)
  local text = redis.call('HGET', P .. K.node .. node, N.resources)
  return text and cjson.decode(text) or {}
end

-- Resources of a node that no task of its slots uses: derived each time, so no death can make it wrong.
local function free_resources(node)
  local free = resources_of(node)
  for _, slot in ipairs(slots_of(node)) do
    local keys = redis.call('HKEYS', P .. K.slot .. slot)
    for _, key in ipairs(keys) do
      local r = load(key)
      if r and r.state == 'processing' and has_flag(r, L.constraint) then
        for name, amount in pairs(needs_of(signature_of(r))) do free[name] = (free[name] or 0) - amount end
      end
    end
  end
  return free
end

-- Constraints of which tasks are ready, with the number of those.
local function waiting_constraints()
  local found = {}
  for _, signature in ipairs(redis.call('HKEYS', P .. K.constraints)) do
    local length = redis.call('ZCARD', P .. K.picky .. signature)
    if length > 0 then found[#found + 1] = {signature = signature, length = length} end
  end
  return found
end

-- Whether some live node may run the tasks of a constraint, if not now.
local function is_runnable(signature)
  for _, name in ipairs(all_nodes()) do
    local node = node_of(name)
    if node and node.may_take and admits(signature, name) and fits(signature, resources_of(name)) then return true end
  end
  return false
end
