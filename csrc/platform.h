// What differs between nvcc, NVRTC and the host emulator, in one place.
//
// Everything else under csrc/ uses only these names and plain C++17, without any standard header,
// because NVRTC has none.
#pragma once

#if defined(__CUDACC__)

#define SN72_DEVICE __device__ __forceinline__
#define SN72_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
#define SN72_SHARED(type, name) __shared__ type name
#define SN72_VECTOR __align__(16)
// For loops that rarely run twice: unrolled division would only cost registers.
#define SN72_NO_UNROLL _Pragma("unroll 1")

#if defined(__CUDACC_RTC__)
// nvcc finds this in the CUDA headers; NVRTC has the types built in but not the function.
extern "C" __device__ __cudart_builtin__ void CUDARTAPI
cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned int value);
#endif

#else

#include "emulator/simt.h"

#endif

namespace sn72 {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i32 = int;
using u64 = unsigned long long;
using i64 = long long;

#if defined(__CUDACC__)

SN72_DEVICE float float_from_bits(u32 bits) { return __uint_as_float(bits); }

// Without fast-math: at most 1 unit in the last place from the true value, subnormals kept.
SN72_DEVICE float exp_float(float x) { return expf(x); }

// Never contracted into one fused operation, so that sums are those of the host.
SN72_DEVICE double multiply_rounded(double a, double b) { return __dmul_rn(a, b); }
SN72_DEVICE double add_rounded(double a, double b) { return __dadd_rn(a, b); }

// Nanoseconds on a clock that all kernels of one device share.
SN72_DEVICE u64 clock_ns() {
  u64 now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

SN72_DEVICE void set_condition(u64 handle, u32 value) { cudaGraphSetConditional(handle, value); }

#else

inline float float_from_bits(u32 bits) { return simt::float_from_bits(bits); }
inline float exp_float(float x) { return simt::exp_float(x); }
inline double multiply_rounded(double a, double b) { return a * b; }
inline double add_rounded(double a, double b) { return a + b; }
inline u64 clock_ns() { return simt::clock_ns(); }
inline void set_condition(u64 handle, u32 value) { simt::set_condition(handle, value); }

#endif

}  // namespace sn72
