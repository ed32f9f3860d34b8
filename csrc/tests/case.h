// One random boundary: buffers with guard entries, and the arguments that point into them.
#pragma once

#include <random>
#include <vector>

#include "../layout.h"

namespace test {

// 16-bit floats written by hand, so that widening is checked against something else.
enum class Format { F32, F16, BF16 };

struct Boundary {
  Format format = Format::F32;
  unsigned threads = 32;
  int batch = 0;
  sn72::u64 elapsed = 0;
  std::vector<sn72::Sample> samples;
  std::vector<float> score;        // what the format's bits mean, by sample
  std::vector<sn72::u16> bits;     // 16-bit formats only
  std::vector<sn72::u8> scored, eligible;
  std::vector<float> low, high;
  std::vector<sn72::u64> budget;
  std::vector<sn72::i32> index;
  sn72::Control control{};
  sn72::u64 start = 0;
  std::vector<sn72::u64> conditions;
  sn72::RouteArgs args{};
};

// What must come out, computed another way: see oracle.cpp.
struct Expected {
  std::vector<sn72::Sample> samples;
  std::vector<sn72::i32> escalated;
  int bucket = 0;
};

constexpr sn72::i32 UNTOUCHED = -12345;

Boundary draw(std::mt19937& random, int capacity);
Expected expect(const Boundary& boundary);
double meaning(Format format, sn72::u16 bits);
double logistic(double x);

}  // namespace test
