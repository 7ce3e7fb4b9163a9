-- Queue jobs, each at most once. Returns the ids that were new.
-- ARGV: then, for each job: id, place, brief, spec, batch
--   place sorts the waiting line: "<priority>:<not_before>:<id>"
local new = {}
for i = 1, #ARGV, 5 do
  local id, place, brief, spec, batch = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]
  local job = 'safelight:job:' .. id
  if redis.call('HEXISTS', job, 'state') == 0 then
    redis.call('HSET', job, 'state', 'queued', 'place', place, 'brief', brief, 'spec', spec, 'attempts', 0)
    redis.call('ZADD', 'safelight:waiting', 0, place)
    redis.call('SADD', 'safelight:batch:' .. batch, id)
    new[#new + 1] = id
  end
end
for _, worker in ipairs(redis.call('SMEMBERS', 'safelight:workers')) do
  local wake = 'safelight:wake:' .. worker
  redis.call('DEL', wake)
  redis.call('LPUSH', wake, 1)
end
return new
