-- Move one job from the waiting line into a worker's own RQ queue, unless a hold is set, or a person has paused since the
-- worker looked at its holds. The worker takes it out before it dispatches again, so that whatever else lies in that queue
-- is not ours and goes.
-- ARGV: worker, place, id, RQ queue key, RQ job key, RQ job id, then the RQ job's fields and values
-- Returns 1 when moved, 0 when another worker was faster or this one may not. Sent again after a lost reply, it returns
-- 1 again: the RQ job's id is new in every call.
local worker, place, id = ARGV[1], ARGV[2], ARGV[3]
if redis.call('HGET', 'safelight:running', id) == worker and redis.call('LINDEX', ARGV[4], 0) == ARGV[6] then return 1 end
if redis.call('HLEN', 'safelight:holds:' .. worker) > 0 or redis.call('EXISTS', 'safelight:paused') == 1 then return 0 end
if redis.call('ZREM', 'safelight:waiting', place) == 0 then return 0 end
redis.call('HSET', 'safelight:running', id, worker)
redis.call('HSET', 'safelight:job:' .. id, 'state', 'running', 'worker', worker)
redis.call('HSET', ARGV[5], unpack(ARGV, 7))
redis.call('SADD', 'rq:queues', ARGV[4])
redis.call('DEL', ARGV[4])
redis.call('RPUSH', ARGV[4], ARGV[6])
return 1
