-- What a listing shows of many jobs in one answer. ARGV: ids. Returns an array of {id, state, attempts, brief, error, outputs}.
local rows = {}
for i = 1, #ARGV do
  local f = redis.call('HMGET', 'safelight:job:' .. ARGV[i], 'state', 'attempts', 'brief', 'error', 'outputs')
  if f[1] then rows[#rows + 1] = {ARGV[i], f[1], f[2] or '0', f[3] or '{}', f[4] or '', f[5] or '[]'} end
end
return rows
