-- Reserve tickets for ready work, as far as there are slots that neither run one nor have one on its way.
-- LIB         record nodes copies queue tickets fence
-- KEYS        1 meta            hash  {ns}:meta
-- ARGV        3 fence           int   term of the coordinator; empty for a worker that has just come
--             4 ticket_lease    int   ms
-- RETURNS     tickets to send: Celery queue, id, Celery queue, id...
-- ERRORS      FENCED            another coordinator leads
-- INVARIANTS  tickets whose lease is over are given up: their message is lost or late, either does no harm
-- COST        O(log T + N + C + slots woken): T tickets, N nodes, C constraints
local fenced = check_fence(ARGV[3])
if fenced then return fenced end
local lease, nodes, tickets = tonumber(ARGV[4]), all_nodes(), {}
give_up_late_tickets(nodes)
local ready = redis.call('ZCARD', SHARED)
if ready > 0 then reserve_tickets(ready - wake(ready), lease, tickets) end
for _, node in ipairs(nodes) do added_home[node] = redis.call('ZCARD', home_queue(node)) end
for _, queue in ipairs(waiting_constraints()) do added_picky[queue.signature] = queue.length end
call_for_placed(lease, tickets)
return tickets
