// The kernels on the emulator as a shared library, launched by name as the driver launches them.
// tests/cpu/simulated_cuda.py loads it.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../sn72_kernels.cu"

namespace {

template <typename Args>
Args copied(const void* record) {
  Args args;
  std::memcpy(&args, record, sizeof args);
  return args;
}

}  // namespace

extern "C" {

// Run a kernel to its end. `grid` and `threads` as in a launch; `record` is its argument record.
// Returns 0, or 1 for a name that is no kernel.
int sn72_emulate(const char* kernel, unsigned grid_x, unsigned grid_y, unsigned threads,
                 unsigned seed, const void* record) {
  const simt::Dim grid{grid_x, grid_y, 1};
  const auto is = [&](const char* name) { return std::strcmp(kernel, name) == 0; };
  const auto route = [&](auto entry) {
    const auto args = copied<sn72::RouteArgs>(record);
    simt::launch(grid, threads, seed, [&] { entry(args); });
  };
  const auto scatter = [&](auto entry) {
    const auto args = copied<sn72::ScatterArgs>(record);
    simt::launch_independent(grid, threads, [&] { entry(args); });
  };
  if (is("sn72_begin")) {
    const auto args = copied<sn72::BeginArgs>(record);
    simt::launch_independent(grid, threads, [&] { sn72_begin(args); });
  } else if (is("sn72_gather")) {
    const auto args = copied<sn72::GatherArgs>(record);
    simt::launch_independent(grid, threads, [&] { sn72_gather(args); });
  } else if (is("sn72_route_f32")) {
    route(sn72_route_f32);
  } else if (is("sn72_route_f16")) {
    route(sn72_route_f16);
  } else if (is("sn72_route_bf16")) {
    route(sn72_route_bf16);
  } else if (is("sn72_scatter_f32")) {
    scatter(sn72_scatter_f32);
  } else if (is("sn72_scatter_f16")) {
    scatter(sn72_scatter_f16);
  } else if (is("sn72_scatter_bf16")) {
    scatter(sn72_scatter_bf16);
  } else {
    return 1;
  }
  return 0;
}

void sn72_set_clock(std::uint64_t now_ns) { simt::set_clock_ns(now_ns); }

// Conditions set since the last call, in order; returns their number, of which at most `room` are
// written.
unsigned sn72_take_conditions(std::uint64_t* handles, unsigned* values, unsigned room) {
  const auto taken = simt::take_conditions();
  for (unsigned i = 0; i < std::min<std::size_t>(room, taken.size()); ++i) {
    handles[i] = taken[i].first;
    values[i] = taken[i].second;
  }
  return static_cast<unsigned>(taken.size());
}

}  // extern "C"
