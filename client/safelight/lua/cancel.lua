-- Cancel jobs. A waiting one leaves the line at once, and its receipt is still to be written; a running one is asked
-- to stop.
-- ARGV: now (epoch seconds), seconds to keep an ended job, then ids
-- Returns for each id: cancelled | asked | its state | unknown
local answers = {}
for i = 3, #ARGV do
  local id = ARGV[i]
  local job = 'safelight:job:' .. id
  local state = redis.call('HGET', job, 'state')
  if not state then
    answers[#answers + 1] = 'unknown'
  elseif state == 'queued' then
    redis.call('ZREM', 'safelight:waiting', redis.call('HGET', job, 'place'))
    redis.call('HSET', job, 'state', 'cancelled')
    redis.call('ZADD', 'safelight:ended', ARGV[1], id)
    redis.call('EXPIRE', job, ARGV[2])
    redis.call('SADD', 'safelight:unwritten', id)
    answers[#answers + 1] = 'cancelled'
  elseif state == 'running' then
    redis.call('HSET', job, 'cancel', 1)
    redis.call('RPUSH', 'safelight:cancel:' .. id, 1)
    redis.call('EXPIRE', 'safelight:cancel:' .. id, 86400)
    answers[#answers + 1] = 'asked'
  else
    if state == 'cancelled' then redis.call('SADD', 'safelight:unwritten', id) end -- it may be, from an older version
    answers[#answers + 1] = state
  end
end
return answers
