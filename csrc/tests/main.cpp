// Runs the kernels of sn72_kernels.cu on the emulator.
//
//   kernels random <cases> <seed> [<file> <line>]   against the oracle; optionally without the
//                                                   barrier that stands there
//   kernels layout                                  sizes and offsets of the shared records
//   kernels replay <input> <output>                 one route call from and to binary files
//
// Exit status: 0 as expected, 1 a wrong answer, 3 the emulator's own complaint.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

#include "../sn72_kernels.cu"
#include "case.h"

namespace {

using test::Boundary;
using test::Format;

long failures = 0;

void check(bool ok, const char* what, unsigned seed) {
  if (ok) return;
  if (++failures <= 10) std::printf("WRONG: %s (case seed %u)\n", what, seed);
}

void route(Boundary& boundary, unsigned seed) {
  sn72::RouteArgs& args = boundary.args;
  args.samples = boundary.samples.data();
  args.score = boundary.format == Format::F32 ? static_cast<const void*>(boundary.score.data())
                                              : static_cast<const void*>(boundary.bits.data());
  args.low = boundary.low.data();
  args.high = boundary.high.data();
  args.start_ns = &boundary.start;
  args.batch = &boundary.batch;
  args.index = boundary.index.data();
  args.control = &boundary.control;
  args.conditions = boundary.conditions.data();
  boundary.start = 77;
  // A clock that has stepped back counts as one that stands still.
  const unsigned back = boundary.elapsed ? 0 : seed % 78;
  simt::set_clock_ns(boundary.start + boundary.elapsed - back);
  // A second block must do nothing: it would race with the first.
  simt::launch({1 + seed % 2, 1, 1}, boundary.threads, seed, [&] {
    if (boundary.format == Format::F32) sn72_route_f32(args);
    if (boundary.format == Format::F16) sn72_route_f16(args);
    if (boundary.format == Format::BF16) sn72_route_bf16(args);
  });
}

bool same(const sn72::Sample& a, const sn72::Sample& b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}

// Nothing but the samples may change, and nobody may be told which body to run.
void check_combined(const Boundary& boundary, const test::Expected& expected, unsigned seed) {
  check(std::equal(expected.samples.begin(), expected.samples.end(), boundary.samples.begin(),
                   boundary.samples.end(), same),
        "combined samples", seed);
  check(boundary.control.count == test::UNTOUCHED && boundary.control.bucket == test::UNTOUCHED &&
            boundary.control.rows == test::UNTOUCHED && boundary.control.elapsed_us == 0,
        "control of a boundary inside a group", seed);
  check(std::all_of(boundary.index.begin(), boundary.index.end(),
                    [](int value) { return value == test::UNTOUCHED; }),
        "index of a boundary inside a group", seed);
  check(simt::take_conditions().empty(), "conditions of a boundary inside a group", seed);
}

void test_route(std::mt19937& random, int capacity, unsigned seed) {
  Boundary boundary = test::draw(random, capacity);
  const test::Expected expected = test::expect(boundary);
  const sn72::RouteArgs& args = boundary.args;
  boundary.control = {test::UNTOUCHED, test::UNTOUCHED, test::UNTOUCHED, 0};
  route(boundary, seed);
  if (args.flags & sn72::COMBINE_ONLY) return check_combined(boundary, expected, seed);
  const int count = static_cast<int>(expected.escalated.size());
  const int rows = expected.bucket < args.bucket_count ? args.buckets[expected.bucket] : 0;
  check(std::equal(expected.samples.begin(), expected.samples.end(), boundary.samples.begin(),
                   boundary.samples.end(), same),
        "samples", seed);
  check(boundary.control.count == count, "count", seed);
  check(boundary.control.bucket == expected.bucket, "bucket", seed);
  check(boundary.control.rows == rows, "rows", seed);
  check(boundary.control.elapsed_us == boundary.elapsed / 1000, "elapsed time", seed);
  check(std::equal(expected.escalated.begin(), expected.escalated.end(), boundary.index.begin()),
        "order of the index", seed);
  for (int i = count; i < static_cast<int>(boundary.index.size()); ++i) {
    check(boundary.index[i] == (i < rows ? 0 : test::UNTOUCHED), "padding of the index", seed);
  }
  const auto conditions = simt::take_conditions();
  std::vector<simt::Condition> wanted;
  if (args.flags & sn72::SET_CONDITION) {
    wanted.emplace_back(args.condition, static_cast<unsigned>(expected.bucket));
  }
  for (int b = 0; args.flags & sn72::SET_EACH && b < args.bucket_count; ++b) {
    wanted.emplace_back(boundary.conditions[b], b == expected.bucket);
  }
  check(conditions == wanted, "conditions", seed);
}

// Logits: the probability is the logistic function to 4 float32 steps, and the route follows it.
void test_logits(std::mt19937& random, int capacity, unsigned seed) {
  Boundary boundary = test::draw(random, capacity);
  boundary.format = Format::F32;
  boundary.batch = capacity;
  boundary.args.flags = sn72::FROM_LOGITS;
  boundary.args.scored = nullptr;
  boundary.args.combine = sn72::REPLACE;
  boundary.args.weight = 1.0;
  boundary.args.stage = boundary.args.first = 3;  // after those that the samples know
  std::vector<float> logits(capacity);
  for (float& x : logits) {
    x = std::ldexp(static_cast<float>(random() >> 8) * 0x1p-23f - 1.0f, int(random() % 9));
    if (random() % 16 == 0) x = random() % 2 ? HUGE_VALF : std::nanf("");
  }
  boundary.score = logits;
  const std::vector<sn72::Sample> before = boundary.samples;
  route(boundary, seed);
  for (int i = 0; i < capacity; ++i) {
    if (!before[i].open) continue;
    const sn72::Sample& sample = boundary.samples[i];
    const double truth = test::logistic(logits[i]);
    if (std::isnan(truth)) {
      check(sample.probability == before[i].probability && sample.route == sn72::ESCALATE,
            "a logit that is no number must escalate", seed);
      continue;
    }
    const float rounded = static_cast<float>(truth);
    const double step = std::nextafter(rounded, 2.0f) - rounded;
    check(std::fabs(sample.probability - truth) <= 4.0 * step, "logistic function", seed);
    const std::size_t at = boundary.args.threshold_stride ? i : 0;
    const int decision = sn72::route_one(sample.probability, boundary.low[at], boundary.high[at]);
    check(sample.route == decision, "route of a logit", seed);
  }
}

void test_begin(std::mt19937& random, int capacity, unsigned seed) {
  std::vector<sn72::Sample> samples(capacity + 1);
  for (auto& sample : samples) sample.status = 99;
  std::vector<sn72::u8> scored(capacity + 1, 7);
  sn72::u64 start = 0;
  simt::set_clock_ns(random());
  const sn72::BeginArgs args{samples.data(), scored.data(), &start, capacity, 0};
  simt::launch({1u + unsigned(random() % 3), 1, 1}, 256, seed, [&] { sn72_begin(args); });
  check(start == simt::clock_ns(), "start of the clock", seed);
  for (int i = 0; i < capacity; ++i) {
    check(samples[i].open == 1 && samples[i].status == sn72::PENDING &&
              samples[i].probability == 0.5f && samples[i].route == sn72::ESCALATE &&
              samples[i].stage == sn72::NO_STAGE && samples[i].weight == 0.0 &&
              samples[i].sum == 0.0 && samples[i].floor == 0.0f &&
              samples[i].voter == sn72::NO_STAGE && samples[i].raiser == sn72::NO_STAGE &&
              samples[i].closed == sn72::NO_STAGE && samples[i].failed == 0 &&
              scored[i] == sn72::NO_STAGE,
          "fresh sample", seed);
  }
  check(samples[capacity].status == 99 && scored[capacity] == 7, "begin beyond capacity", seed);
}

void test_scatter(std::mt19937& random, int capacity, unsigned seed) {
  const bool through_index = random() % 2, labels = random() % 2;
  const Format format = static_cast<Format>(random() % 3);
  const sn72::i64 stride = 1 + random() % 3;
  const sn72::i32 count = static_cast<sn72::i32>(random() % unsigned(capacity + 1));
  std::vector<sn72::i32> index(capacity);
  for (int i = 0; i < capacity; ++i) index[i] = i;
  if (through_index) std::shuffle(index.begin(), index.end(), random);
  // Exactly `count` scores: reading a padding row is an error under AddressSanitizer.
  std::vector<sn72::u16> bits(count * stride);
  std::vector<float> wide(count * stride), out(capacity, -7.0f);
  std::vector<sn72::i64> label(count), label_out(capacity, -7);
  std::vector<sn72::u8> scored(capacity, sn72::NO_STAGE);
  for (int i = 0; i < int(bits.size()); ++i) {
    bits[i] = static_cast<sn72::u16>(random());
    wide[i] = static_cast<float>(
        test::meaning(format == Format::F32 ? Format::F16 : format, bits[i]));
  }
  for (auto& value : label) value = static_cast<sn72::i64>(random()) << 8;
  sn72::ScatterArgs args{};
  args.score = format == Format::F32 ? static_cast<const void*>(wide.data()) : bits.data();
  args.label = labels ? label.data() : nullptr;
  args.label_out = label_out.data();
  args.index = through_index ? index.data() : nullptr;
  args.count = &count;
  args.out = out.data();
  args.scored = scored.data();
  args.score_stride = stride;
  args.stage = 4;
  simt::launch({1u + unsigned(random() % 3), 1, 1}, 256, seed, [&] {
    if (format == Format::F32) sn72_scatter_f32(args);
    if (format == Format::F16) sn72_scatter_f16(args);
    if (format == Format::BF16) sn72_scatter_bf16(args);
  });
  for (int row = 0; row < capacity; ++row) {
    const int at = index[row];
    if (row >= count) {
      check(out[at] == -7.0f && scored[at] == sn72::NO_STAGE && label_out[at] == -7,
            "scatter of padding", seed);
      continue;
    }
    const float value = wide[row * stride];
    check(out[at] == value || (std::isnan(out[at]) && std::isnan(value)), "scattered score", seed);
    check(scored[at] == 4, "scattered stage", seed);
    const bool labelled = labels && value >= 0.0f && value <= 1.0f;
    check(label_out[at] == (labelled ? label[row] : -7), "scattered label", seed);
  }
}

void test_gather(std::mt19937& random, int rows, unsigned seed) {
  // Offsets and lengths that force each word size.
  const int unit = std::vector<int>{1, 2, 4, 16}[random() % 4];
  const sn72::i64 row_bytes = unit * (1 + random() % 40);
  const sn72::i64 source_stride = row_bytes + unit * (random() % 3);
  const sn72::i64 target_stride = row_bytes + unit * (random() % 3);
  const int offset = unit * int(random() % 2);
  const int source_rows = 1 + int(random() % 50);
  struct alignas(16) Word {
    sn72::u8 bytes[16];
  };
  std::vector<Word> from((offset + source_rows * source_stride) / 16 + 1);
  std::vector<Word> to((offset + rows * target_stride) / 16 + 1);
  auto* source = reinterpret_cast<sn72::u8*>(from.data()) + offset;
  auto* target = reinterpret_cast<sn72::u8*>(to.data()) + offset;
  for (sn72::i64 i = 0; i < source_rows * source_stride; ++i) source[i] = sn72::u8(random() % 250);
  std::memset(target, 251, rows * target_stride);
  std::vector<sn72::i32> index(rows);
  for (auto& value : index) value = int(random() % unsigned(source_rows));
  const sn72::GatherArgs args{source,        target,        index.data(), row_bytes,
                              source_stride, target_stride, rows,         0};
  simt::launch({1u + unsigned(random() % 2), 1u + unsigned(random() % 3), 1}, 32, seed,
               [&] { sn72_gather(args); });
  for (int row = 0; row < rows; ++row) {
    const sn72::u8* copy = target + row * target_stride;
    check(std::memcmp(copy, source + index[row] * source_stride, row_bytes) == 0, "gathered row",
          seed);
    for (sn72::i64 i = row_bytes; i < target_stride; ++i) {
      check(copy[i] == 251, "gather wrote between rows", seed);
    }
  }
}

void test_widening() {
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const auto half = sn72::u16(bits);
    const float f16 = sn72::widen(sn72::Half{half}), bf16 = sn72::widen(sn72::BFloat16{half});
    const auto agrees = [](float got, double want) {
      return std::isnan(want) ? std::isnan(got)
                              : got == float(want) && std::signbit(got) == std::signbit(want);
    };
    check(agrees(f16, test::meaning(Format::F16, half)), "fp16", bits);
    check(agrees(bf16, test::meaning(Format::BF16, half)), "bf16", bits);
  }
}

int run_random(int cases, unsigned seed) {
  test_widening();
  for (int number = 0; number < cases; ++number) {
    const unsigned case_seed = seed + static_cast<unsigned>(number);
    std::mt19937 random(case_seed);
    // Mostly around one or two passes of a small block; now and then thousands of samples.
    const int limit = number % 16 == 0 ? 3000 : number % 4 == 0 ? 600 : 150;
    const int capacity = 1 + static_cast<int>(random() % unsigned(limit));
    test_route(random, capacity, case_seed);
    if (number % 8 == 0) {
      test_logits(random, std::min(capacity, 300), case_seed);
      test_begin(random, std::min(capacity, 600), case_seed);
      test_scatter(random, std::min(capacity, 600), case_seed);
      test_gather(random, 1 + int(random() % 20), case_seed);
    }
  }
  std::printf("%d cases, %ld wrong\n", cases, failures);
  return failures ? 1 : 0;
}

#define SHOW(record, field) \
  std::printf("%s.%s %zu\n", #record, #field, offsetof(sn72::record, field))
#define SHOW_SIZE(record) std::printf("%s %zu\n", #record, sizeof(sn72::record))

int show_layout() {
  SHOW_SIZE(Sample);
  SHOW(Sample, sum), SHOW(Sample, weight), SHOW(Sample, floor), SHOW(Sample, probability);
  SHOW(Sample, route), SHOW(Sample, status), SHOW(Sample, stage), SHOW(Sample, voter);
  SHOW(Sample, raiser), SHOW(Sample, open), SHOW(Sample, closed), SHOW(Sample, failed);
  SHOW_SIZE(Control);
  SHOW(Control, count), SHOW(Control, bucket), SHOW(Control, rows), SHOW(Control, elapsed_us);
  SHOW_SIZE(BeginArgs);
  SHOW(BeginArgs, samples), SHOW(BeginArgs, scored), SHOW(BeginArgs, start_ns);
  SHOW(BeginArgs, capacity);
  SHOW_SIZE(RouteArgs);
  SHOW(RouteArgs, samples), SHOW(RouteArgs, score), SHOW(RouteArgs, scored), SHOW(RouteArgs, low);
  SHOW(RouteArgs, high), SHOW(RouteArgs, eligible), SHOW(RouteArgs, budget_ns);
  SHOW(RouteArgs, start_ns), SHOW(RouteArgs, batch), SHOW(RouteArgs, index);
  SHOW(RouteArgs, control), SHOW(RouteArgs, condition), SHOW(RouteArgs, conditions);
  SHOW(RouteArgs, score_stride);
  SHOW(RouteArgs, weight), SHOW(RouteArgs, threshold_stride), SHOW(RouteArgs, budget_stride);
  SHOW(RouteArgs, capacity), SHOW(RouteArgs, stage), SHOW(RouteArgs, combine);
  SHOW(RouteArgs, flags), SHOW(RouteArgs, bucket_count), SHOW(RouteArgs, first);
  SHOW(RouteArgs, buckets);
  SHOW_SIZE(ScatterArgs);
  SHOW(ScatterArgs, score), SHOW(ScatterArgs, label), SHOW(ScatterArgs, index);
  SHOW(ScatterArgs, count), SHOW(ScatterArgs, out), SHOW(ScatterArgs, label_out);
  SHOW(ScatterArgs, scored), SHOW(ScatterArgs, score_stride), SHOW(ScatterArgs, stage);
  SHOW(ScatterArgs, flags);
  SHOW_SIZE(GatherArgs);
  SHOW(GatherArgs, source), SHOW(GatherArgs, target), SHOW(GatherArgs, index);
  SHOW(GatherArgs, row_bytes), SHOW(GatherArgs, source_stride), SHOW(GatherArgs, target_stride);
  SHOW(GatherArgs, rows);
  return 0;
}

// Input: RouteArgs with its pointers left out, elapsed and element size as 64-bit integers, then
// the arrays samples, score, low, high, scored, eligible, budget, each `capacity` long.
// Output: samples, index (capacity + 8 entries), control.
int replay(const char* input, const char* output) {
  std::ifstream in(input, std::ios::binary);
  const auto read = [&](auto& items, std::size_t count) {
    items.resize(count);
    in.read(reinterpret_cast<char*>(items.data()),
            static_cast<std::streamsize>(count * sizeof items[0]));
  };
  Boundary boundary;
  std::vector<sn72::RouteArgs> args;
  std::vector<sn72::u64> numbers;
  read(args, 1);
  read(numbers, 5);
  boundary.args = args[0];
  boundary.elapsed = numbers[0];
  boundary.format = static_cast<Format>(numbers[1]);
  boundary.batch = static_cast<int>(numbers[2]);
  boundary.threads = static_cast<unsigned>(numbers[3]);
  const auto capacity = static_cast<std::size_t>(boundary.args.capacity);
  read(boundary.samples, capacity);
  if (boundary.format == Format::F32) {
    read(boundary.score, capacity);
  } else {
    read(boundary.bits, capacity);
  }
  read(boundary.low, capacity);
  read(boundary.high, capacity);
  read(boundary.scored, capacity);
  read(boundary.eligible, capacity);
  read(boundary.budget, capacity);
  if (!in) {
    std::fprintf(stderr, "%s: too short\n", input);
    return 2;
  }
  boundary.args.scored = numbers[4] & 1 ? boundary.scored.data() : nullptr;
  boundary.args.eligible = numbers[4] & 2 ? boundary.eligible.data() : nullptr;
  boundary.args.budget_ns = numbers[4] & 4 ? boundary.budget.data() : nullptr;
  boundary.index.assign(capacity + 8, test::UNTOUCHED);
  route(boundary, 2);
  std::ofstream out(output, std::ios::binary);
  const auto write = [&](const void* data, std::size_t bytes) {
    out.write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes));
  };
  write(boundary.samples.data(), capacity * sizeof(sn72::Sample));
  write(boundary.index.data(), boundary.index.size() * sizeof(sn72::i32));
  write(&boundary.control, sizeof boundary.control);
  return out ? 0 : 2;
}

}  // namespace

int main(int count, char** words) {
  const std::string mode = count > 1 ? words[1] : "";
  if (mode == "layout") return show_layout();
  if (mode == "replay" && count == 4) return replay(words[2], words[3]);
  if (mode == "random" && (count == 4 || count == 6)) {
    if (count == 6) simt::drop_barrier(words[4], std::atoi(words[5]));
    return run_random(std::atoi(words[2]), static_cast<unsigned>(std::atoi(words[3])));
  }
  std::fprintf(stderr, "usage: kernels random CASES SEED [FILE LINE] | layout | replay IN OUT\n");
  return 2;
}
