// Random boundaries that dwell on what is easy to get wrong: ties, NaN, infinities, neighbours of
// thresholds, empty and full batches, samples that have left, tables that are too small.
#include <algorithm>
#include <cmath>
#include <limits>

#include "case.h"

namespace test {
namespace {

using sn72::Sample;

constexpr float INF = std::numeric_limits<float>::infinity();

struct Dice {
  std::mt19937& random;
  bool one_in(unsigned n) { return random() % n == 0; }
  int below(int n) { return n <= 0 ? 0 : static_cast<int>(random() % static_cast<unsigned>(n)); }
  float unit() { return static_cast<float>(random() >> 8) * 0x1p-24f; }
};

float threshold(Dice& dice) {
  switch (dice.below(16)) {
    case 0: return std::nanf("");
    case 1: return 0.0f;
    case 2: return 1.0f;
    case 3: return dice.one_in(2) ? INF : -INF;
    case 4: return 1e-40f;  // subnormal
    default: return dice.unit();
  }
}

float score(Dice& dice, float low, float high) {
  switch (dice.below(16)) {
    case 0: return std::nanf("");
    case 1: return dice.one_in(2) ? INF : -INF;
    case 2: return low;
    case 3: return high;
    case 4: return std::nextafter(low, -INF);
    case 5: return std::nextafter(high, INF);
    case 6: return dice.one_in(2) ? -0.0f : 0.0f;
    case 7: return dice.one_in(2) ? 1.0f : std::nextafter(1.0f, 2.0f);
    case 8: return dice.one_in(2) ? -1e-45f : 1e-45f;
    case 9: return 3.0f * dice.unit() - 1.0f;
    default: return dice.unit();
  }
}

Sample sample_in_progress(Dice& dice) {
  Sample sample{0.0, 0.0, 0.0f, 0.5f, sn72::ESCALATE, sn72::PENDING, sn72::NO_STAGE,
                sn72::NO_STAGE, sn72::NO_STAGE, 1, sn72::NO_STAGE, 0};
  if (dice.one_in(3)) {
    sample.weight = 0.05 + dice.unit();
    sample.sum = sample.weight * dice.unit();
    sample.voter = sample.stage = static_cast<sn72::u8>(2 * dice.below(2));
    sample.probability = static_cast<float>(sample.sum / sample.weight);
    sample.status = dice.one_in(4) ? sn72::STAGE_FAILED : sn72::UNDECIDED;
  }
  if (dice.one_in(6)) {
    sample.floor = dice.unit();
    sample.raiser = 1;
    if (sample.floor > sample.probability) {
      sample.probability = sample.floor;
      sample.stage = 1;
    }
  }
  if (dice.one_in(5)) {
    sample.open = 0;
    sample.status = dice.one_in(2) ? sn72::DONE : sn72::DEADLINE;
    sample.route = static_cast<sn72::u8>(dice.below(3));
    sample.closed = 0;
  }
  return sample;
}

void draw_buckets(Dice& dice, int capacity, sn72::RouteArgs& args) {
  if (args.flags & (sn72::LAST_STAGE | sn72::COMBINE_ONLY)) return;
  const int step = std::max(1, capacity / (1 + dice.below(sn72::MAX_BUCKETS - 1)));
  for (int size = step; size < capacity && args.bucket_count < sn72::MAX_BUCKETS - 1; size += step) {
    args.buckets[args.bucket_count++] = size;
  }
  args.buckets[args.bucket_count++] = dice.one_in(12) ? std::max(1, capacity / 3) : capacity;
  std::sort(args.buckets, args.buckets + args.bucket_count);
}

void draw_scores(Dice& dice, Boundary& boundary) {
  const int capacity = boundary.args.capacity;
  for (int i = 0; i < capacity; ++i) {
    const std::size_t at = boundary.args.threshold_stride ? i : 0;
    boundary.score.push_back(score(dice, boundary.low[at], boundary.high[at]));
  }
  if (boundary.format == Format::F32) return;
  for (int i = 0; i < capacity; ++i) {
    // Mostly scores near [0, 1], some of any bit pattern.
    sn72::u16 bits = static_cast<sn72::u16>(dice.random());
    if (!dice.one_in(5)) {
      const int one = boundary.format == Format::F16 ? 0x3c00 : 0x3f80;
      bits = static_cast<sn72::u16>(dice.below(one + 3));
    }
    boundary.bits.push_back(bits);
    boundary.score[i] = static_cast<float>(meaning(boundary.format, bits));
  }
}

}  // namespace

Boundary draw(std::mt19937& random, int capacity) {
  Dice dice{random};
  Boundary boundary;
  sn72::RouteArgs& args = boundary.args;
  args.capacity = capacity;
  boundary.format = static_cast<Format>(dice.below(3));
  boundary.threads = 32u * static_cast<unsigned>(1 + dice.below(dice.one_in(3) ? 32 : 4));
  boundary.batch = dice.one_in(3) ? capacity : dice.below(capacity + 1);
  if (dice.one_in(20)) boundary.batch = dice.one_in(2) ? -3 : capacity + 7;  // clamped
  args.stage = 1 + dice.below(dice.one_in(4) ? 12 : 5);
  args.combine = dice.below(3);
  args.weight = dice.one_in(2) ? 1.0 : 0.1 + dice.unit();
  args.score_stride = 1;
  args.threshold_stride = dice.below(2);
  args.budget_stride = dice.below(2);
  // Samples may have been scored by stages 0 and 1, which are or are not of the same group.
  args.first = dice.one_in(2) ? args.stage : dice.below(args.stage);
  args.flags = (dice.one_in(6) ? sn72::LAST_STAGE : dice.one_in(6) ? sn72::COMBINE_ONLY : 0u) |
               (dice.one_in(2) ? sn72::SET_CONDITION : 0u) |
               (dice.one_in(6) ? sn72::NO_NEGATIVE_EXIT : 0u) |
               (dice.one_in(3) ? sn72::SET_EACH : 0u);
  args.condition = 0xabcdef0123456789ull;
  draw_buckets(dice, capacity, args);
  const float low = threshold(dice), high = threshold(dice);
  for (int i = 0; i < capacity; ++i) {
    boundary.low.push_back(args.threshold_stride ? threshold(dice) : low);
    boundary.high.push_back(args.threshold_stride ? threshold(dice) : high);
    if (!dice.one_in(8) && boundary.low[i] > boundary.high[i]) {
      std::swap(boundary.low[i], boundary.high[i]);
    }
    boundary.samples.push_back(sample_in_progress(dice));
    boundary.scored.push_back(static_cast<sn72::u8>(dice.one_in(4) ? sn72::NO_STAGE : args.stage));
    boundary.eligible.push_back(static_cast<sn72::u8>(dice.below(3)));
    boundary.budget.push_back(dice.below(4) * 1000ull);
  }
  if (dice.one_in(8)) {  // nobody can leave: every count up to the capacity occurs
    for (float& value : boundary.high) value = std::nanf("");
  }
  draw_scores(dice, boundary);
  boundary.elapsed = dice.below(4) * 1000ull;
  boundary.index.assign(capacity + 8, UNTOUCHED);
  for (int b = 0; b < args.bucket_count; ++b) boundary.conditions.push_back(0x5000ull + 7 * b);
  args.scored = dice.one_in(2) ? boundary.scored.data() : nullptr;
  args.eligible = dice.one_in(2) ? boundary.eligible.data() : nullptr;
  args.budget_ns = dice.one_in(2) ? boundary.budget.data() : nullptr;
  return boundary;
}

}  // namespace test
