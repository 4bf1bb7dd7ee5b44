-- wrk script: POST the files of a folder in turn, as raw bodies; prints one line of JSON at the end.
-- Its arguments: the folder, and any number of headers ("Name: value").
local requests, position = {}, 0

function init(arguments)
  local headers = { ["Content-Type"] = "application/octet-stream" }
  for position = 2, #arguments do
    local name, value = arguments[position]:match("^([^:]+): *(.*)$")
    headers[name] = value
  end
  for path in io.popen('ls -d "' .. arguments[1] .. '"/*'):lines() do
    local file = io.open(path, "rb")
    requests[#requests + 1] = wrk.format("POST", wrk.path, headers, file:read("*a"))
    file:close()
  end
end

function request()
  position = position % #requests + 1
  return requests[position]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '{"requests": %d, "seconds": %.6f, "p50_ms": %.3f, "p99_ms": %.3f, "mean_ms": %.3f, "bad_status": %d, "socket_errors": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    latency.mean / 1e3, errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
