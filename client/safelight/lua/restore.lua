-- Put an ended job where it belongs, whatever the queue remembered: after a wipe, or a crash between receipt and queue.
-- ARGV: id, place, brief, spec, batch, state, attempts, error, outputs, finished (epoch seconds), seconds to keep it
local id, place = ARGV[1], ARGV[2]
local job = 'safelight:job:' .. id
redis.call('ZREM', 'safelight:waiting', place, redis.call('HGET', job, 'place') or place)
redis.call('HDEL', 'safelight:running', id)
redis.call('HSET', job, 'place', place, 'brief', ARGV[3], 'spec', ARGV[4], 'state', ARGV[6], 'attempts', ARGV[7],
  'error', ARGV[8], 'outputs', ARGV[9])
redis.call('SADD', 'safelight:batch:' .. ARGV[5], id)
redis.call('ZADD', 'safelight:ended', ARGV[10], id)
redis.call('EXPIRE', job, ARGV[11])
return 1
