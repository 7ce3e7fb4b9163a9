-- A job that one worker took is run by another, who began it before the server forgot that. ARGV: id, taker, who runs it
-- Returns 1, or 0 when it is not the taker's: it has ended meanwhile, or gone back.
local id, taker, runner = ARGV[1], ARGV[2], ARGV[3]
if redis.call('HGET', 'safelight:running', id) ~= taker then return 0 end
redis.call('HSET', 'safelight:running', id, runner)
redis.call('HSET', 'safelight:job:' .. id, 'worker', runner)
return 1
