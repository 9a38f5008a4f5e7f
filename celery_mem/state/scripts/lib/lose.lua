-- A copy is not where the record says. With the last one the result is gone: it is made again, from as deep in its
-- lineage as inputs are gone too, and what was about to read it waits again. A task that runs already is left
-- alone: it may have read the copy, and if not, its slot will find out and report it.
local function wait_again(name, is_lost)
  local d = load(name)
  if not d then return end
  if d.state == 'waiting' then d.waiting = d.waiting + 1
  elseif d.state == 'ready' then
    dequeue(d)
    set_state(d, 'waiting')
    d.waiting = 1
  else return end
  touch(d)
  if is_lost then settle_later(name) end
end

local function lose_copy(key, token, place)
  local r = load(key)
  if not has_copy(r, token, place) then return end
  remove_copy(r, place)
  if #r.copies.places > 0 then
    -- It will be written again under this name: nobody is to delete that.
    if place == DURABLE then redis.call('SREM', P .. K.debris, token) end
    see_durable(r)
    return
  end
  local is_lost = not r.recipe
  drop_data(r)
  clear_data(r)
  if is_lost then notify(r, error_notice(key)) else notify(r, 'p') end
  if r.needed > 0 then
    for _, name in ipairs(dependents_of(r)) do wait_again(name, is_lost) end
  end
  settle_later(key)
end
