-- A running job has ended, or goes back to its own place in the line, which `place` among the fields may make a later one.
-- ARGV: id, worker, new state, finished (epoch seconds), seconds to keep it, then fields and values of the job
-- Returns 1, or 0 when the job was not this worker's to conclude, or the server has forgotten what it was.
local id, worker, state = ARGV[1], ARGV[2], ARGV[3]
local job = 'safelight:job:' .. id
if redis.call('HGET', 'safelight:running', id) ~= worker then return 0 end
redis.call('HDEL', 'safelight:running', id)
redis.call('DEL', 'safelight:cancel:' .. id)
if redis.call('HEXISTS', job, 'place') == 0 then
  redis.call('DEL', job)
  return 0
end
redis.call('HDEL', job, 'progress', 'worker')
redis.call('HSET', job, 'state', state)
if #ARGV > 5 then redis.call('HSET', job, unpack(ARGV, 6)) end
if state == 'queued' then
  redis.call('ZADD', 'safelight:waiting', 0, redis.call('HGET', job, 'place'))
else
  redis.call('ZREMRANGEBYSCORE', 'safelight:ended', '-inf', ARGV[4] - ARGV[5])
  redis.call('ZADD', 'safelight:ended', ARGV[4], id)
  redis.call('EXPIRE', job, ARGV[5])
end
return 1
