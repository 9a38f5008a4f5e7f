-- A node goes: it stopped in good order, or its lease is over and its slots were abandoned.
-- LIB         record notices nodes copies queue tickets settle lose relief capacity fence
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        5 node            str
--             6 fence           int   term of the coordinator that found the lease over; empty: the node itself asks
--             7 most            int   copies lost, or ready tasks sent elsewhere, in this call
-- RETURNS     {slots of the node that still run a ticket: while any are left nothing is done,
--             copies and ready tasks left: call again while any are, tickets to send}
-- ERRORS      FENCED            another coordinator leads
-- INVARIANTS  a coordinator ends only a node whose lease is over, judged by this script's own clock; its copies are lost, as
--             lose.lua tells; in the end it has no mailbox, queue, ticket nor index; works when Redis is full
-- COST        O(N + what is lost): N nodes; at most `most` copies and `budget` records that are raised
local node, most = ARGV[5], tonumber(ARGV[7])
local fenced = check_fence(ARGV[6])
if fenced then return fenced end
relief()
if ARGV[6] ~= '' and tonumber(redis.call('ZSCORE', P .. K.nodes, node) or 0) > now() then return {{}, 0, {}} end
local slots = slots_of(node)
if #slots > 0 then
  count_capacity()
  return {slots, 0, {}}
end

known_nodes[node] = false      -- nothing is to go there any more
local index, queue = P .. K.node_keys .. node, home_queue(node)
local keys = redis.call('SRANDMEMBER', index, most)
for _, key in ipairs(keys) do
  local r = load(key)
  local copies = r and copies_of(r)
  if copies then lose_copy(key, copies.token, node) end
  index_copy(node, key, false)      -- also where there is no such record
end
if #keys < most then
  for _, member in ipairs(redis.call('ZRANGE', queue, 0, most - #keys - 1)) do
    local r = load(string.sub(member, 18))
    if r and r.state == 'ready' then
      dequeue(r)
      enqueue(r)
    else redis.call('ZREM', queue, member) end
  end
end
local tickets = finish()
local left = redis.call('SCARD', index) + redis.call('ZCARD', queue)
if left == 0 then
  redis.call('ZREM', P .. K.nodes, node)
  redis.call('UNLINK', P .. K.node .. node, P .. K.mail .. node)
  for _, id in ipairs(redis.call('ZRANGE', P .. K.node_tickets .. node, 0, -1)) do take_up_ticket(id) end
end
count_capacity()
return {{}, left, tickets}
