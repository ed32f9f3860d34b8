// The kernels of the device executor. Launch shapes and order of use: csrc/README.md.
//
// One translation unit, so that nvcc writes one fatbin and NVRTC compiles one program. extern "C"
// names are what the host looks up.
#include "move_core.h"
#include "route_core.h"

#define SN72_ROUTE(suffix, Score)                                                  \
  SN72_KERNEL(1024) sn72_route_##suffix(const sn72::RouteArgs args) {              \
    SN72_SHARED(sn72::RouteShared, shared);                                        \
    if (blockIdx.x == 0) sn72::route_block<Score>(args, shared);                   \
  }

SN72_ROUTE(f32, float)
SN72_ROUTE(f16, sn72::Half)
SN72_ROUTE(bf16, sn72::BFloat16)

#define SN72_SCATTER(suffix, Score)                                                \
  SN72_KERNEL(256) sn72_scatter_##suffix(const sn72::ScatterArgs args) {           \
    sn72::scatter_scores<Score>(args);                                             \
  }

SN72_SCATTER(f32, float)
SN72_SCATTER(f16, sn72::Half)
SN72_SCATTER(bf16, sn72::BFloat16)

SN72_KERNEL(256) sn72_begin(const sn72::BeginArgs args) { sn72::begin_samples(args); }

SN72_KERNEL(256) sn72_gather(const sn72::GatherArgs args) { sn72::gather_rows(args); }
