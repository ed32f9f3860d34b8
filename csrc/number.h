// Scores as float32: exact widening of 16-bit formats, and the logistic function.
#pragma once

#include "platform.h"

namespace sn72 {

// 16-bit floats as their bits: NVRTC offers no fp16 header, and widening is exact in integers.
struct Half {
  u16 bits;
};
struct BFloat16 {
  u16 bits;
};

SN72_DEVICE float quiet_nan() { return float_from_bits(0x7fc00000u); }

SN72_DEVICE float widen(float value) { return value; }

SN72_DEVICE float widen(BFloat16 value) { return float_from_bits(u32(value.bits) << 16); }

SN72_DEVICE float widen(Half value) {
  const u32 sign = u32(value.bits & 0x8000u) << 16;
  const u32 exponent = (value.bits >> 10) & 0x1fu;
  const u32 fraction = value.bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24, exact in float32
    const float magnitude = float(fraction) * float_from_bits(0x33800000u);
    return sign ? -magnitude : magnitude;
  }
  // Infinity and NaN keep the largest exponent; others are rebiased from 15 to 127.
  const u32 wide = exponent == 0x1fu ? 0xffu : exponent + 112u;
  return float_from_bits(sign | (wide << 23) | (fraction << 13));
}

SN72_DEVICE bool is_finite(float x) {
  const float largest = float_from_bits(0x7f7fffffu);
  return x >= -largest && x <= largest;  // false for NaN
}

// The definition of sn72engine.cascade.route.sigmoid: exp(-|x|) cannot overflow, and a logit that
// is infinite or NaN gives NaN, which escalates. Division and addition round as IEEE 754 demands
// (no fast-math), so the only freedom left is the last place of exp.
SN72_DEVICE float sigmoid(float x) {
  if (!is_finite(x)) return quiet_nan();
  const float e = exp_float(x >= 0.0f ? -x : x);
  return (x >= 0.0f ? 1.0f : e) / (1.0f + e);
}

}  // namespace sn72
