-- Notices: what the holders of a task learn. One stream per client; an entry holds pairs
-- key -> "<epoch> <code><bytes>" with code m value, M in memory, e error, p pending, c cancelled, l lost: then the bytes are
-- the key of the data that is lost, newline, why. With an empty key: t the client lost its name, i it inherited all.
local notices = {}

local function note(client, key, epoch, code, bytes)
  local list = notices[client]
  if not list then
    list = {}
    notices[client] = list
  end
  local n = #list
  list[n + 1], list[n + 2] = key, epoch .. ' ' .. code .. (bytes or '')
end

local function notify(r, code, bytes)
  if r.holders == '' then return end
  for id, epoch in holders_of(r) do
    if is_client(id) then note(id, r.key, epoch, code, bytes) end
  end
end

local function notify_result(r, kind, data, limit)
  if kind == 'v' and #data <= limit then notify(r, 'm', data) else notify(r, 'M') end
end

-- The pickled error that the task `blame` raised; empty where data was lost instead.
local function error_of(blame) return redis.call('HGET', P .. K.task .. blame, F.error) or '' end

-- Code and bytes of a notice about an error: of the one that the task `blame` raised, or of the data that was lost there:
-- its key and, in a second line, why nothing can make it again, empty for scattered data.
local function error_notice(blame)
  local error = error_of(blame)
  if error ~= '' then return 'e', error end
  local r, why = load(blame), ''
  if not r then why = 'its record in Redis is gone, or unreadable'
  elseif has_flag(r, L.durable) then why = 'its durable copy is gone, for which its lineage was given up' end
  return 'l', blame .. '\n' .. why
end

-- Tell one client how a finished task stands, as when it takes a hold late.
local function note_standing(client, r, epoch, limit)
  if not is_client(client) then return end
  if r.state == 'memory' then
    local value = extra(r, F.value)
    if value and #value <= limit then note(client, r.key, epoch, 'm', value)
    else note(client, r.key, epoch, 'M') end
  elseif r.state == 'erred' then note(client, r.key, epoch, error_notice(extra(r, F.blame) or r.key))
  elseif r.state == 'lost' then note(client, r.key, epoch, error_notice(r.key)) end
end

local function flush_notices()
  for client, list in pairs(notices) do
    for i = 1, #list, 2000 do
      redis.call('XADD', P .. K.notices .. client, '*', unpack(list, i, math.min(i + 1999, #list)))
    end
  end
end
