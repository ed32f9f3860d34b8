// A CUDA block on one host thread: enough of the programming model to run csrc/ under sanitizers.
//
// Every CUDA thread is a fiber. A fiber runs until it reaches a barrier or a warp vote; which fiber
// runs next is drawn at random, so an answer that depends on the order of threads between two
// barriers (a missing __syncthreads) shows up as a wrong answer in some seed. Shared memory is
// filled with random bytes before each block. Reported as errors: threads of a block waiting at
// different barriers, a thread that ends while others wait, a vote with a partial mask.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#define SN72_DEVICE inline
#define SN72_KERNEL(threads) void
#define SN72_SHARED(type, name) type& name = *static_cast<type*>(simt::shared_memory(sizeof(type)))
#define SN72_VECTOR alignas(16)
#define SN72_NO_UNROLL
#define __syncthreads() simt::barrier(__FILE__, __LINE__)

namespace simt {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

// Run `kernel` for each block of the grid in turn; `seed` draws the order of threads.
void launch(Dim grid, unsigned threads, unsigned seed, const std::function<void()>& kernel);

// The same for kernels whose threads neither wait nor vote: each runs from start to end, without a
// fiber, which is some hundred times faster.
void launch_independent(Dim grid, unsigned threads, const std::function<void()>& kernel);

// Barriers that are left out, by line number of the file that ends in `file`: a test drops one to
// show that the other tests notice.
void drop_barrier(const char* file, int line);

void barrier(const char* file, int line);
unsigned ballot(unsigned mask, bool predicate);
void* shared_memory(std::size_t bytes);

float float_from_bits(std::uint32_t bits);
float exp_float(float x);

// The device clock: stands still unless a test moves it.
std::uint64_t clock_ns();
void set_clock_ns(std::uint64_t now);

// Calls of cudaGraphSetConditional, in order: handle and value.
using Condition = std::pair<std::uint64_t, unsigned>;
void set_condition(std::uint64_t handle, unsigned value);
std::vector<Condition> take_conditions();

}  // namespace simt

extern simt::Dim threadIdx, blockIdx, blockDim, gridDim;

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  return simt::ballot(mask, predicate);
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
