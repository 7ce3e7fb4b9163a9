-- Look at the next due job of the waiting line without taking it.
-- ARGV: now (epoch seconds), then the open priority classes in order ("0" high ... "3" night)
-- Returns {place or '', seconds until something is due or -1}
local now, due_in = tonumber(ARGV[1]), -1
for i = 2, #ARGV do
  local first = redis.call('ZRANGEBYLEX', 'safelight:waiting', '[' .. ARGV[i] .. ':', '(' .. ARGV[i] .. ';', 'LIMIT', 0, 1)[1]
  if first then
    local wait = (tonumber(string.sub(first, 3, 14)) or 0) - now -- what is no place is due: the worker removes it
    if wait <= 0 then return {first, 0} end
    if due_in < 0 or wait < due_in then due_in = wait end
  end
end
return {'', math.ceil(due_in)}
