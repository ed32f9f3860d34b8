// Codes and argument records that the host shares with the kernels.
//
// sn72engine/cuda/layout.py mirrors this file field by field; a test compares sizes and offsets.
// Args records are passed to kernels by value. All pointers are device pointers. "Per sample" means
// indexed by the sample's original position in the batch, with `capacity` entries.
#pragma once

#include "platform.h"

namespace sn72 {

enum Route : u8 { NEGATIVE = 0, POSITIVE = 1, ESCALATE = 2 };

enum Status : u8 { PENDING = 0, DONE = 1, UNDECIDED = 2, DEADLINE = 3, STAGE_FAILED = 4 };

// How a stage's score joins what earlier stages said; see sn72engine/cascade/tally.py.
enum Combine : i32 { REPLACE = 0, WEIGHTED = 1, POSITIVE_ONLY = 2 };

enum Flag : u32 {
  FROM_LOGITS = 1u,       // scores are logits of the positive class
  LAST_STAGE = 2u,        // nothing runs after it: every sample gets its final status
  SET_CONDITION = 4u,     // tell the SWITCH node `condition` which body to run
  NO_NEGATIVE_EXIT = 8u,  // a score below `low` escalates too
  SET_EACH = 16u,         // tell `bucket_count` IF nodes, of which one at most runs its body
  COMBINE_ONLY = 32u,     // another stage of the group follows: combine the score, decide nothing
};

constexpr u8 NO_STAGE = 255;       // no stage has scored the sample
constexpr i32 FAILURE_BITS = 8;    // stages that have a bit in Sample::failed
constexpr i32 MAX_BUCKETS = 32;    // entries of the bucket table
constexpr i32 BLOCK_LIMIT = 1024;  // threads of the largest block
constexpr i32 WARP = 32;

// All that is known about one sample, at its original position; 32 bytes. Written by begin and
// route only, and copied to the host as the answer.
struct SN72_VECTOR Sample {
  double sum;         // vote: sum of weight * score
  double weight;      // vote: sum of weights; 0 for an empty vote
  float floor;        // highest score of positive_only stages since the vote was replaced
  float probability;  // combined: finite and in [0, 1]; 0.5 before any stage
  u8 route;           // Route by which it left; ESCALATE while it has not
  u8 status;          // Status
  u8 stage;           // stage that `probability` is due to, or NO_STAGE
  u8 voter;           // last stage of the vote, or NO_STAGE
  u8 raiser;          // last stage of the floor, or NO_STAGE
  u8 open;            // 1 until it leaves or its time runs out
  u8 closed;          // stage at whose boundary it left or its time ran out, or NO_STAGE
  u8 failed;          // bit s: stage s gave it no probability, for the first FAILURE_BITS stages
};

// What one boundary decided; 16 bytes, so that a host that waits for it copies one word.
struct SN72_VECTOR Control {
  i32 count;       // samples that the next stage is to see
  i32 bucket;      // position in the bucket table; bucket_count means: run nothing
  i32 rows;        // size of that bucket, 0 for none
  u32 elapsed_us;  // microseconds since start_ns, modulo 2^32; 0 without start_ns
};

struct BeginArgs {
  Sample* samples;  // capacity
  u8* scored;       // capacity
  u64* start_ns;    // one value: the clock now, from which time budgets count
  i32 capacity;
  i32 reserved;
};

struct RouteArgs {
  Sample* samples;       // capacity
  const void* score;     // element i * score_stride belongs to sample i
  const u8* scored;      // null: every sample has a score; else those that hold `stage`
  const float* low;      // element i * threshold_stride
  const float* high;     // element i * threshold_stride
  const u8* eligible;    // non-zero: the next stage applies to the sample; null: it applies to all
  const u64* budget_ns;  // element i * budget_stride: time since start_ns; null: no limit
  const u64* start_ns;   // from begin; needed with budget_ns; null: nothing is timed
  const i32* batch;      // one value: how many of `capacity` samples are real
  i32* index;            // out: as many entries as the largest bucket has rows
  Control* control;      // out
  u64 condition;         // cudaGraphConditionalHandle, for SET_CONDITION
  const u64* conditions; // bucket_count handles, for SET_EACH
  i64 score_stride;
  double weight;         // of the stage, for WEIGHTED and REPLACE; above 0
  i32 threshold_stride;  // 0: one pair for all; 1: one per sample
  i32 budget_stride;     // likewise
  i32 capacity;
  i32 stage;             // that gave the scores; below NO_STAGE
  i32 combine;           // Combine
  u32 flags;             // of Flag
  i32 bucket_count;      // 0 to MAX_BUCKETS
  i32 first;             // first stage of the group that `stage` is in; `stage` when by itself
  i32 buckets[MAX_BUCKETS];  // ascending; the last one holds `capacity`
};

struct ScatterArgs {
  const void* score;   // element row * score_stride
  const i64* label;    // element row; null: none
  const i32* index;    // row -> sample, from the boundary before; null: row is the sample
  const i32* count;    // one value: real rows; those after them are padding
  float* out;          // per sample: probability, for RouteArgs.score
  i64* label_out;      // per sample; with `label`
  u8* scored;          // per sample: becomes `stage`, for RouteArgs.scored
  i64 score_stride;
  i32 stage;
  u32 flags;           // FROM_LOGITS
};

struct GatherArgs {
  const u8* source;   // row r begins at r * source_stride
  u8* target;         // row r begins at r * target_stride
  const i32* index;   // target row -> source row
  i64 row_bytes;
  i64 source_stride;  // bytes
  i64 target_stride;  // bytes
  i32 rows;           // target rows: the bucket's size
  i32 reserved;
};

static_assert(sizeof(Sample) == 32, "mirrored in sn72engine/cuda/layout.py");
static_assert(sizeof(Control) == 16, "mirrored in sn72engine/cuda/layout.py");
static_assert(sizeof(BeginArgs) == 32, "mirrored in sn72engine/cuda/layout.py");
static_assert(sizeof(RouteArgs) == 280, "mirrored in sn72engine/cuda/layout.py");
static_assert(sizeof(ScatterArgs) == 72, "mirrored in sn72engine/cuda/layout.py");
static_assert(sizeof(GatherArgs) == 56, "mirrored in sn72engine/cuda/layout.py");

}  // namespace sn72
