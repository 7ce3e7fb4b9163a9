-- Count jobs by what decides how long they take: the part of the brief before its batch.
-- ARGV: the mark that ends that part, then ids. Returns {shape, jobs, one of their ids} for each shape.
local counts, first = {}, {}
for i = 2, #ARGV do
  local brief = redis.call('HGET', 'safelight:job:' .. ARGV[i], 'brief')
  if brief then
    local stop = string.find(brief, ARGV[1], 1, true)
    local shape = string.sub(brief, 1, (stop or 1) - 1)
    counts[shape] = (counts[shape] or 0) + 1
    first[shape] = first[shape] or ARGV[i]
  end
end
local found = {}
for shape, count in pairs(counts) do found[#found + 1] = {shape, count, first[shape]} end
return found
