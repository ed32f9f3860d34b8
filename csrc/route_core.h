// Routing: decide each open sample, compact those that escalate, pick their bucket.
//
// Semantics: sn72engine/cascade/route.py and tally.py. Only IEEE comparisons of float32 decide.
#pragma once

#include "layout.h"
#include "number.h"

namespace sn72 {

// Whether p is a probability; false for NaN.
SN72_DEVICE bool is_sound(float p) { return p >= 0.0f && p <= 1.0f; }

SN72_DEVICE u8 route_one(float p, float low, float high) {
  if (!is_sound(p) || !(low <= high)) return ESCALATE;  // NaN thresholds fail low <= high
  if (p < low) return NEGATIVE;
  if (p > high) return POSITIVE;
  return ESCALATE;
}

// First bucket that holds `count` samples; `bucket_count` (no body) when there are none, or when
// none fits: the host sees `count` samples and no rows, and reports it; nothing is cut off.
SN72_DEVICE i32 bucket_of(i32 count, const i32* buckets, i32 bucket_count) {
  if (count == 0) return bucket_count;
  for (i32 b = 0; b < bucket_count; ++b) {
    if (buckets[b] >= count) return b;
  }
  return bucket_count;
}

// Rows that are in use, whatever stands in memory.
SN72_DEVICE i32 clamped(i32 value, i32 limit) {
  return value < 0 ? 0 : (value > limit ? limit : value);
}

// Take score p, a probability, into the vote or the floor of a sample; false if it does not count.
// Arithmetic as in sn72engine/cascade/tally.py: double sums, each operation rounded by itself.
SN72_DEVICE bool combine(Sample& sample, float p, i32 how, double weight, u8 stage) {
  if (how == POSITIVE_ONLY) {
    if (!(p > sample.probability)) return false;
    sample.floor = p;
    sample.raiser = stage;
  } else {
    if (how == REPLACE) {
      sample.sum = sample.weight = 0.0;
      sample.floor = 0.0f;
      sample.raiser = NO_STAGE;
    }
    sample.sum = add_rounded(sample.sum, multiply_rounded(weight, double(p)));
    sample.weight = add_rounded(sample.weight, weight);
    sample.voter = stage;
  }
  const float vote = sample.weight > 0.0 ? float(sample.sum / sample.weight) : 0.5f;
  const bool raised = sample.floor > vote;
  sample.probability = raised ? sample.floor : vote;
  sample.stage = raised ? sample.raiser : sample.voter;
  return true;
}

// Take the stage's score p of an open sample.
SN72_DEVICE void take(const RouteArgs& args, Sample& sample, float p) {
  if (!is_sound(p)) {
    sample.status = STAGE_FAILED;  // unless a later stage scores it
    if (args.stage < FAILURE_BITS) sample.failed |= u8(1u << args.stage);
  } else if (combine(sample, p, args.combine, args.weight, u8(args.stage))) {
    sample.status = UNDECIDED;
  }
}

// Stages in the order in which they are combined: 0 for NO_STAGE, else one more than the number.
SN72_DEVICE i32 place(u8 stage) { return (stage + 1) & 255; }

// Let what the stages of the group said decide about an open sample. Every score that counted left
// its stage as the voter or the raiser, so the later of the two is the last that changed the sample.
SN72_DEVICE void judge(const RouteArgs& args, Sample& sample, float low, float high) {
  const i32 voter = place(sample.voter), raiser = place(sample.raiser);
  const i32 latest = voter > raiser ? voter : raiser;
  if (latest <= args.first) return;  // nothing that the group said counts
  const u8 decision = route_one(sample.probability, low, high);
  if (decision == ESCALATE) return;
  const bool voted = voter > args.first;
  if (decision == NEGATIVE && (!voted || (args.flags & NO_NEGATIVE_EXIT))) return;
  sample.route = decision;
  sample.status = DONE;
  sample.closed = u8(latest - 1);
  sample.open = 0;
}

// Settle sample i; true if the next stage is to see it.
template <typename Score>
SN72_DEVICE bool settle(const RouteArgs& args, i32 i, u64 elapsed_ns) {
  Sample sample = args.samples[i];
  if (!sample.open) return false;
  if (!args.scored || args.scored[i] == args.stage) {
    const float value = widen(static_cast<const Score*>(args.score)[i * args.score_stride]);
    const float p = args.flags & FROM_LOGITS ? sigmoid(value) : value;
    take(args, sample, p);
  }
  if (args.flags & COMBINE_ONLY) {
    args.samples[i] = sample;
    return false;
  }
  const i64 threshold = i64(i) * args.threshold_stride;
  judge(args, sample, args.low[threshold], args.high[threshold]);
  bool escalates = false;
  if (args.flags & LAST_STAGE) {
    if (sample.status == PENDING) sample.status = STAGE_FAILED;  // no stage applied to it
  } else if (sample.open && (!args.eligible || args.eligible[i])) {
    escalates = !args.budget_ns || elapsed_ns < args.budget_ns[i64(i) * args.budget_stride];
    if (!escalates) {
      sample.status = DEADLINE;
      sample.closed = u8(args.stage);
      sample.open = 0;
    }
  }
  args.samples[i] = sample;
  return escalates;
}

struct RouteShared {
  u64 elapsed_ns;
  i32 escalated[2][BLOCK_LIMIT / WARP];  // per warp; two sets, used in turn
};

// Tell the conditional nodes which body is to run. The caller is the only thread that does.
SN72_DEVICE void choose_body(const RouteArgs& args, i32 bucket) {
  if (args.flags & SET_CONDITION) set_condition(args.condition, u32(bucket));
  if (args.flags & SET_EACH) {
    for (i32 b = 0; b < args.bucket_count; ++b) {
      set_condition(args.conditions[b], u32(b == bucket));
    }
  }
}

// One block does it all: the order of the index comes from a block-wide scan, and exactly one
// thread sets the condition. blockDim.x must be a multiple of 32 and at most BLOCK_LIMIT.
template <typename Score>
SN72_DEVICE void route_block(const RouteArgs& args, RouteShared& shared) {
  const i32 thread = i32(threadIdx.x);
  const i32 threads = i32(blockDim.x);
  const i32 lane = thread % WARP;
  const i32 warp = thread / WARP;
  const i32 warps = threads / WARP;
  const i32 batch = clamped(*args.batch, args.capacity);

  // One reading of the clock for all, so that equal budgets are treated alike. Nothing promises
  // that the clock never steps back: a difference below 0 must not become the largest number.
  if (thread == 0) {
    const u64 now = args.start_ns ? clock_ns() : 0;
    shared.elapsed_ns = args.start_ns && now > *args.start_ns ? now - *args.start_ns : 0;
  }
  __syncthreads();
  const u64 elapsed_ns = shared.elapsed_ns;

  i32 count = 0;
  i32 set = 0;
  for (i32 first = 0; first < batch; first += threads) {
    const i32 i = first + thread;
    const bool escalates = i < batch && settle<Score>(args, i, elapsed_ns);
    const u32 votes = __ballot_sync(0xffffffffu, escalates);
    if (lane == 0) shared.escalated[set][warp] = __popc(votes);
    // The only barrier of a pass: the next pass writes the other set, and the one after it can
    // begin only when every warp has passed the next barrier and so has read this set.
    __syncthreads();
    i32 before = __popc(votes & ((1u << lane) - 1u));
    i32 total = 0;
    for (i32 w = 0; w < warps; ++w) {
      const i32 escalated = shared.escalated[set][w];
      if (w < warp) before += escalated;
      total += escalated;
    }
    if (escalates) args.index[count + before] = i;
    count += total;
    set ^= 1;
  }

  const i32 bucket = bucket_of(count, args.buckets, args.bucket_count);
  const i32 rows = bucket < args.bucket_count ? args.buckets[bucket] : 0;
  // Padding rows read sample 0, which exists and is finite; they are never scattered.
  for (i32 row = count + thread; row < rows; row += threads) args.index[row] = 0;
  if (thread == 0 && !(args.flags & COMBINE_ONLY)) {
    *args.control = Control{count, bucket, rows, u32(elapsed_ns / 1000)};
    choose_body(args, bucket);
  }
}

}  // namespace sn72
