#include "simt.h"

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SN72_ASAN 1
#else
#define SN72_ASAN 0
#endif

simt::Dim threadIdx, blockIdx, blockDim, gridDim;

namespace simt {
namespace {

constexpr std::size_t STACK_BYTES = 256 * 1024;
constexpr unsigned WARP = 32;

enum class Wait { NOTHING, BARRIER, VOTE, END };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;  // AddressSanitizer's, while the fiber is not running
  Wait wait = Wait::NOTHING;
  int line = 0;            // of the barrier it waits at
  bool predicate = false;  // its vote
  unsigned votes = 0;      // the answer to its vote
};

std::vector<Fiber> fibers;  // grows to the largest block; stacks are reused
Fiber* running = nullptr;
ucontext_t scheduler;
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
std::size_t scheduler_stack_bytes = 0;
const std::function<void()>* body = nullptr;
std::unique_ptr<char[]> shared;
std::size_t shared_bytes = 0;
std::mt19937 random_source;
std::uint64_t now_ns = 0;
std::vector<Condition> conditions;
std::string dropped_file;
int dropped_line = 0;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s (block %u)\n", what, blockIdx.x);
  std::exit(3);
}

// The three calls below tell AddressSanitizer that the stack changes under it.
void before_switch([[maybe_unused]] void** save, [[maybe_unused]] const void* stack,
                   [[maybe_unused]] std::size_t bytes) {
#if SN72_ASAN
  __sanitizer_start_switch_fiber(save, stack, bytes);
#endif
}

void enter_fiber([[maybe_unused]] void* fake_stack) {
#if SN72_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

void enter_scheduler() {
#if SN72_ASAN
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
}

void wait_for(Wait what) {
  Fiber* me = running;
  if (!me) fail("a kernel that waits was launched as independent threads");
  me->wait = what;
  before_switch(what == Wait::END ? nullptr : &me->fake_stack, scheduler_stack,
                scheduler_stack_bytes);
  swapcontext(&me->context, &scheduler);
  enter_fiber(me->fake_stack);
}

void fiber_main() {
  enter_fiber(nullptr);
  (*body)();
  wait_for(Wait::END);
}

void prepare(Fiber& fiber) {
  if (!fiber.stack) fiber.stack.reset(new char[STACK_BYTES]);
  fiber.wait = Wait::NOTHING;
  fiber.fake_stack = nullptr;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = STACK_BYTES;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

void resume(unsigned thread) {
  running = &fibers[thread];
  threadIdx.x = thread;
  before_switch(&scheduler_fake_stack, running->stack.get(), STACK_BYTES);
  swapcontext(&scheduler, &running->context);
  enter_scheduler();
}

// Release a warp whose threads have all voted.
bool release_vote(unsigned first) {
  unsigned votes = 0;
  for (unsigned lane = 0; lane < WARP; ++lane) {
    const Fiber& fiber = fibers[first + lane];
    if (fiber.wait != Wait::VOTE) return false;
    votes |= unsigned(fiber.predicate) << lane;
  }
  for (unsigned lane = 0; lane < WARP; ++lane) {
    fibers[first + lane].votes = votes;
    fibers[first + lane].wait = Wait::NOTHING;
  }
  return true;
}

// Release the block if all of it waits at one barrier.
bool release_barrier(unsigned threads) {
  for (unsigned t = 0; t < threads; ++t) {
    if (fibers[t].wait != Wait::BARRIER) return false;
    if (fibers[t].line != fibers[0].line) fail("threads wait at different barriers");
  }
  for (unsigned t = 0; t < threads; ++t) fibers[t].wait = Wait::NOTHING;
  return true;
}

void run_block(unsigned threads) {
  if (fibers.size() < threads) fibers.resize(threads);
  shared.reset();
  std::vector<unsigned> order(threads);
  for (unsigned t = 0; t < threads; ++t) {
    prepare(fibers[t]);
    order[t] = t;
  }
  for (;;) {
    // Some warps sit out a round, so that others run ahead as far as barriers let them.
    const unsigned awake = random_source() % 4 ? static_cast<unsigned>(random_source()) : ~0u;
    bool progress = false;
    unsigned ended = 0;
    for (unsigned t = threads; t > 1; --t) {
      std::swap(order[t - 1], order[random_source() % t]);
    }
    for (const unsigned thread : order) {
      if (fibers[thread].wait == Wait::NOTHING) {
        if (awake >> (thread / WARP) & 1u) resume(thread);
        progress = true;
      }
      ended += fibers[thread].wait == Wait::END;
    }
    if (ended == threads) return;
    for (unsigned first = 0; first < threads; first += WARP) progress |= release_vote(first);
    progress |= release_barrier(threads);
    if (!progress) fail("deadlock: some threads ended or vote while others wait");
  }
}

}  // namespace

void launch(Dim grid, unsigned threads, unsigned seed, const std::function<void()>& kernel) {
  if (threads == 0 || threads > 1024 || threads % WARP) fail("block is not 1 to 32 whole warps");
  random_source.seed(seed);
  body = &kernel;
  gridDim = grid;
  blockDim = Dim{threads, 1, 1};
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(threads);
  }
}

void launch_independent(Dim grid, unsigned threads, const std::function<void()>& kernel) {
  gridDim = grid;
  blockDim = Dim{threads, 1, 1};
  running = nullptr;
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
      for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel();
    }
  }
}

void drop_barrier(const char* file, int line) {
  dropped_file = file;
  dropped_line = line;
}

void barrier(const char* file, int line) {
  const std::string name(file);
  const bool same_file =
      name.size() >= dropped_file.size() &&
      name.compare(name.size() - dropped_file.size(), dropped_file.size(), dropped_file) == 0;
  if (dropped_line == line && same_file) return;
  if (running) running->line = line;
  wait_for(Wait::BARRIER);
}

unsigned ballot(unsigned mask, bool predicate) {
  if (mask != 0xffffffffu) fail("vote with a partial mask");
  if (running) running->predicate = predicate;
  wait_for(Wait::VOTE);
  return running->votes;
}

void* shared_memory(std::size_t bytes) {
  if (!shared) {
    shared.reset(new char[bytes]);
    shared_bytes = bytes;
    for (std::size_t i = 0; i < bytes; ++i) shared[i] = char(random_source());
  }
  if (bytes != shared_bytes) fail("a kernel may declare one shared object");
  return shared.get();
}

float float_from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

float exp_float(float x) { return std::exp(x); }

std::uint64_t clock_ns() { return now_ns; }
void set_clock_ns(std::uint64_t now) { now_ns = now; }

void set_condition(std::uint64_t handle, unsigned value) { conditions.emplace_back(handle, value); }

std::vector<Condition> take_conditions() { return std::exchange(conditions, {}); }

}  // namespace simt
