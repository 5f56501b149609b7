// The arithmetic of shaping, on the bit patterns of IEEE numbers. Patterns are compared and not numbers, because a comparison
// of numbers gives another result under flush-to-zero. The four dtypes then differ in three constants only.
#pragma once

#include <cstdint>
#include <limits>

#include "fastshape/macros.h"

namespace fastshape {

// `Bits` is the signed integer of the dtype's width. `kInfinity` and `kOne` are the patterns of +inf and 1.0.
struct Float16 {
  using Bits = int16_t;
  static constexpr Bits kInfinity = 0x7C00, kOne = 0x3C00;
};
struct BFloat16 {
  using Bits = int16_t;
  static constexpr Bits kInfinity = 0x7F80, kOne = 0x3F80;
};
struct Float32 {
  using Bits = int32_t;
  static constexpr Bits kInfinity = 0x7F800000, kOne = 0x3F800000;
};
struct Float64 {
  using Bits = int64_t;
  static constexpr Bits kInfinity = 0x7FF0000000000000, kOne = 0x3FF0000000000000;
};
// bool and uint8, which can be packed but not shaped. Everything except zero is positive.
struct Byte {
  using Bits = uint8_t;
  static constexpr Bits kInfinity = 0xFF, kOne = 1;
};

// x > 0: false for NaN, +0, -0 and everything negative (whose patterns are negative integers); true for +inf.
template <class Number>
FASTSHAPE_FUNCTION bool is_positive(typename Number::Bits x) {
  return x > 0 && x <= Number::kInfinity;
}

// All bits of a pattern except the sign. A constant, because nvcc does not allow numeric_limits inside a device function.
template <class Bits>
constexpr Bits kMagnitude = std::numeric_limits<Bits>::max();

// abs(x) <= 1: false for NaN, whose pattern without the sign is above the pattern of infinity.
template <class Number>
FASTSHAPE_FUNCTION bool is_within_one(typename Number::Bits x) {
  return (x & kMagnitude<typename Number::Bits>) <= Number::kOne;
}

// One shaped element: B(x) * M or x * M. The mask selects: where M is 0 the result is +0 for every x.
template <class Number, bool kBinarize>
FASTSHAPE_FUNCTION typename Number::Bits shape_element(typename Number::Bits x, bool keep) {
  using Bits = typename Number::Bits;
  if (kBinarize) return keep && is_positive<Number>(x) ? Number::kOne : Bits{0};
  return keep ? x : Bits{0};
}

}  // namespace fastshape
