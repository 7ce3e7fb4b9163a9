-- Put an ended job back into the line (the person said retry). ARGV: id. Returns 1, or 0 when it is not an ended job.
local id = ARGV[1]
local job = 'safelight:job:' .. id
local state = redis.call('HGET', job, 'state')
if not state or state == 'queued' or state == 'running' then return 0 end
redis.call('ZREM', 'safelight:ended', id)
redis.call('SREM', 'safelight:unwritten', id)
redis.call('DEL', 'safelight:cancel:' .. id) -- what it was asked, and ended before it heard
redis.call('HDEL', job, 'cancel', 'error', 'outputs', 'progress')
redis.call('HSET', job, 'state', 'queued', 'attempts', 0)
redis.call('PERSIST', job)
redis.call('ZADD', 'safelight:waiting', 0, redis.call('HGET', job, 'place'))
for _, worker in ipairs(redis.call('SMEMBERS', 'safelight:workers')) do
  local wake = 'safelight:wake:' .. worker
  redis.call('DEL', wake)
  redis.call('LPUSH', wake, 1)
end
return 1
