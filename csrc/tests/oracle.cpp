// The routing semantics once more, written for a reader and in double precision throughout, with
// none of the kernels' code. Two things follow the normative definition literally, because their
// rounding is part of it: combined probabilities round to float32.
#include <cmath>

#include "case.h"

namespace test {

using sn72::Sample;

double meaning(Format format, sn72::u16 bits) {
  const double sign = bits >> 15 ? -1.0 : 1.0;
  const int width = format == Format::F16 ? 10 : 7;
  const int bias = format == Format::F16 ? 15 : 127;
  const int exponent = (bits & 0x7fff) >> width;
  const int fraction = bits & ((1 << width) - 1);
  if (exponent == 2 * bias + 1) return fraction ? std::nan("") : sign * HUGE_VAL;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - width);
  return sign * std::ldexp(fraction + (1 << width), exponent - bias - width);
}

double logistic(double x) {
  if (!std::isfinite(x)) return std::nan("");
  return 1.0 / (1.0 + std::exp(-x));
}

namespace {

bool between_zero_and_one(double p) { return !std::isnan(p) && p >= 0.0 && p <= 1.0; }

int decide(double p, double low, double high) {
  if (std::isnan(low) || std::isnan(high) || low > high) return 2;
  return p < low ? 0 : p > high ? 1 : 2;
}

void combine_score(const Boundary& boundary, int i, Sample& sample) {
  const sn72::RouteArgs& args = boundary.args;
  const double p = boundary.score[i];
  if (!between_zero_and_one(p)) {
    sample.status = sn72::STAGE_FAILED;
    if (args.stage < 8) sample.failed = static_cast<sn72::u8>(sample.failed | 1 << args.stage);
    return;
  }
  const auto stage = static_cast<sn72::u8>(args.stage);
  if (args.combine == sn72::POSITIVE_ONLY) {
    if (p <= sample.probability) return;
    sample.floor = static_cast<float>(p);
    sample.raiser = stage;
  } else {
    const bool joins = args.combine == sn72::WEIGHTED;
    sample.sum = (joins ? sample.sum : 0.0) + args.weight * p;
    sample.weight = (joins ? sample.weight : 0.0) + args.weight;
    sample.voter = stage;
    if (!joins) {
      sample.floor = 0.0f;
      sample.raiser = sn72::NO_STAGE;
    }
  }
  float vote = 0.5f;
  if (sample.weight != 0.0) vote = static_cast<float>(sample.sum / sample.weight);
  sample.stage = sample.floor > vote ? sample.raiser : sample.voter;
  sample.probability = std::fmax(vote, sample.floor);
  sample.status = sn72::UNDECIDED;
}

void decide_sample(const Boundary& boundary, int i, Sample& sample) {
  const sn72::RouteArgs& args = boundary.args;
  // The stages of the group that this sample heard: by vote, and by raising its floor.
  const int vote = sample.voter == sn72::NO_STAGE || sample.voter < args.first ? -1 : sample.voter;
  const int rise = sample.raiser == sn72::NO_STAGE || sample.raiser < args.first ? -1 : sample.raiser;
  const int latest = vote > rise ? vote : rise;
  if (latest < 0) return;
  const std::size_t at = args.threshold_stride ? i : 0;
  const int route = decide(sample.probability, boundary.low[at], boundary.high[at]);
  const bool may_be_negative = vote >= 0 && !(args.flags & sn72::NO_NEGATIVE_EXIT);
  if (route == 2 || (route == 0 && !may_be_negative)) return;
  sample.route = static_cast<sn72::u8>(route);
  sample.status = sn72::DONE;
  sample.closed = static_cast<sn72::u8>(latest);
  sample.open = 0;
}

}  // namespace

Expected expect(const Boundary& boundary) {
  const sn72::RouteArgs& args = boundary.args;
  Expected expected;
  expected.samples = boundary.samples;
  for (int i = 0; i < boundary.batch && i < args.capacity; ++i) {
    Sample& sample = expected.samples[i];
    if (!sample.open) continue;
    if (!args.scored || boundary.scored[i] == args.stage) combine_score(boundary, i, sample);
    if (args.flags & sn72::COMBINE_ONLY) continue;
    decide_sample(boundary, i, sample);
    if (args.flags & sn72::LAST_STAGE) {
      if (sample.status == sn72::PENDING) sample.status = sn72::STAGE_FAILED;
      continue;
    }
    if (!sample.open || (args.eligible && !boundary.eligible[i])) continue;
    if (args.budget_ns && boundary.elapsed >= boundary.budget[args.budget_stride ? i : 0]) {
      sample.status = sn72::DEADLINE;
      sample.closed = static_cast<sn72::u8>(args.stage);
      sample.open = 0;
      continue;
    }
    expected.escalated.push_back(i);
  }
  const int count = static_cast<int>(expected.escalated.size());
  int bucket = 0;
  while (bucket < args.bucket_count && (count == 0 || args.buckets[bucket] < count)) ++bucket;
  expected.bucket = bucket;
  return expected;
}

}  // namespace test
