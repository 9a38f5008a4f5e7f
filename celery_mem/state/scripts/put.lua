-- Put data that the client brings (scatter) into the graph and hold it.
-- LIB         record notices nodes copies queue tickets settle hold reset
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        5 client          str
--             6 epoch           int
--             7 notice_limit    int   bytes
--             8 ...             per key: key, nbytes, type, kind v|b|n, value or token of the blob or node's copy,
--                               contained keys joined by newlines, node that has the copy
-- RETURNS     tickets to send
-- ERRORS      UNKNOWN_CLIENT    its lease ran out
--             UNKNOWN_NODE      a node that has a copy is not alive; nothing was written
-- INVARIANTS  data that is already there stays, and the new copy is dropped; a task that was to make it is withdrawn;
--             what erred for want of it runs again
-- COST        O(K + D): K keys, D dependents of them
local client, epoch, notice_limit = ARGV[5], ARGV[6], tonumber(ARGV[7])
if not is_known_client(client) then return redis.error_reply('UNKNOWN_CLIENT ' .. client) end
for a = 8, #ARGV, 7 do
  if ARGV[a + 3] == 'n' and not node_of(ARGV[a + 6]) then
    return redis.error_reply('UNKNOWN_NODE ' .. ARGV[a + 6])
  end
end
for a = 8, #ARGV, 7 do
  local key, kind, data = ARGV[a], ARGV[a + 3], ARGV[a + 4]
  local place = kind == 'n' and ARGV[a + 6] or REDIS
  local r = load(key)
  if r and r.state == 'memory' then
    if kind ~= 'v' and not keep_again(r, data, place) then delete_copy(place, data, key) end
    take_hold(client, epoch, r)
    note_standing(client, r, epoch, notice_limit)
  else
    if not r then
      r = {key = key, name = P .. K.task .. key, state = 'released', needed = 0, waiting = 0, attempt = '', flags = '',
        holders = ''}
      records[key] = r
    end
    local was_gone = r.state == 'erred' or r.state == 'lost'
    withdraw(r)
    redis.call('HDEL', r.name, F.error, F.blame)
    r.attempt = ''      -- a run that ends later comes too late
    take_hold(client, epoch, r)
    enter_memory(r, ARGV[a + 1], ARGV[a + 2], kind, data, ARGV[a + 5], '', place)
    notify_result(r, kind, data, notice_limit)
    if was_gone then
      local taken_down = {}
      for _, name in ipairs(dependents_of(r)) do
        local d = load(name)
        if d and d.state == 'erred' then taken_down[#taken_down + 1] = name end
      end
      reset_errors(taken_down)
    end
  end
  settle_later(key)
end
flush_holds(client)
return finish()
