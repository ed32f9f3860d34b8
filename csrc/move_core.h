// Moving data between a batch and the compacted rows of one stage.
#pragma once

#include "route_core.h"

namespace sn72 {

struct SN72_VECTOR Word16 {
  u64 low;
  u64 high;
};

SN72_DEVICE i64 global_thread() { return i64(blockIdx.x) * blockDim.x + threadIdx.x; }
SN72_DEVICE i64 global_threads() { return i64(gridDim.x) * blockDim.x; }

// Before the first stage: nobody has an answer, and time budgets begin to run.
SN72_DEVICE void begin_samples(const BeginArgs& args) {
  if (global_thread() == 0) *args.start_ns = clock_ns();
  for (i64 i = global_thread(); i < args.capacity; i += global_threads()) {
    args.samples[i] = Sample{0.0,     0.0,      0.0f,     0.5f, ESCALATE, PENDING,
                             NO_STAGE, NO_STAGE, NO_STAGE, 1,    NO_STAGE, 0};
    args.scored[i] = NO_STAGE;
  }
}

// Scores of a stage's rows to the samples that they belong to. Padding rows are not even read.
template <typename Score>
SN72_DEVICE void scatter_scores(const ScatterArgs& args) {
  const i64 count = *args.count;
  SN72_NO_UNROLL
  for (i64 row = global_thread(); row < count; row += global_threads()) {
    const float value = widen(static_cast<const Score*>(args.score)[row * args.score_stride]);
    const float p = args.flags & FROM_LOGITS ? sigmoid(value) : value;
    const i64 sample = args.index ? args.index[row] : row;
    args.out[sample] = p;
    args.scored[sample] = u8(args.stage);
    if (args.label && is_sound(p)) args.label_out[sample] = args.label[row];
  }
}

template <typename Word>
SN72_DEVICE void copy_row(const u8* source, u8* target, i64 bytes) {
  const Word* from = reinterpret_cast<const Word*>(source);
  Word* to = reinterpret_cast<Word*>(target);
  const i64 words = bytes / i64(sizeof(Word));
  for (i64 w = global_thread(); w < words; w += global_threads()) to[w] = from[w];
}

// Copies by the widest word that every row's address and length allow. blockIdx.y takes rows.
SN72_DEVICE void gather_rows(const GatherArgs& args) {
  const u64 alignment = u64(args.source) | u64(args.target) | u64(args.row_bytes) |
                        u64(args.source_stride) | u64(args.target_stride);
  for (i32 row = i32(blockIdx.y); row < args.rows; row += i32(gridDim.y)) {
    const u8* source = args.source + args.index[row] * args.source_stride;
    u8* target = args.target + row * args.target_stride;
    if (alignment % 16 == 0) {
      copy_row<Word16>(source, target, args.row_bytes);
    } else if (alignment % 4 == 0) {
      copy_row<u32>(source, target, args.row_bytes);
    } else {
      copy_row<u8>(source, target, args.row_bytes);
    }
  }
}

}  // namespace sn72
