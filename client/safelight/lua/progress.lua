-- Show how far a running job is. ARGV: id, progress. A job the server has forgotten meanwhile stays forgotten: half a
-- hash would look like a job.
local job = 'safelight:job:' .. ARGV[1]
if redis.call('HGET', job, 'state') ~= 'running' then return 0 end
redis.call('HSET', job, 'progress', ARGV[2])
return 1
