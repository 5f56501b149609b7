// Conversion of a dtype's bit patterns to the numbers that sums are computed in, and back. It uses integer arithmetic where
// the machine's own conversion would give another result under flush-to-zero.
#pragma once

#include <cstdint>
#include <cstring>

#include "fastshape/dispatch.h"
#include "fastshape/macros.h"
#include "fastshape/shaping.h"

namespace fastshape {

template <class To, class From>
FASTSHAPE_FUNCTION To pattern_of(From value) {
  static_assert(sizeof(To) == sizeof(From), "a pattern is as wide as its number");
  To result;
  memcpy(&result, &value, sizeof result);
  return result;
}

// `Accumulator` is the type that elements of the dtype are computed in. `load` is exact. `round` takes a double to the nearest
// float (for Float64 it stays a double), then to the nearest number of the dtype; ties go to even both times. A NaN stays a
// NaN of any pattern. The conversion instructions of a GPU do exactly this, and do not flush to zero by default.
template <class Number>
struct Value;

template <>
struct Value<Float64> {
  using Accumulator = double;
  static FASTSHAPE_FUNCTION double load(int64_t pattern) { return pattern_of<double>(pattern); }
  static FASTSHAPE_FUNCTION int64_t round(double value) { return pattern_of<int64_t>(value); }
};

template <>
struct Value<Float32> {
  using Accumulator = float;
  static FASTSHAPE_FUNCTION float load(int32_t pattern) { return pattern_of<float>(pattern); }
  static FASTSHAPE_FUNCTION int32_t round(double value) { return pattern_of<int32_t>(static_cast<float>(value)); }
};

template <>
struct Value<BFloat16> {
  using Accumulator = float;
  static FASTSHAPE_FUNCTION float load(int16_t pattern) {
    return pattern_of<float>(static_cast<uint32_t>(static_cast<uint16_t>(pattern)) << 16);
  }
  static FASTSHAPE_FUNCTION int16_t round(double value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    int16_t pattern;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(pattern) : "f"(static_cast<float>(value)));
    return pattern;
#else
    const uint32_t bits = pattern_of<uint32_t>(static_cast<float>(value));
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0;  // NaN
    return static_cast<int16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
#endif
  }
};

template <>
struct Value<Float16> {
  using Accumulator = float;
  static FASTSHAPE_FUNCTION float load(int16_t pattern) {
#if defined(__CUDA_ARCH__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(pattern));
    return value;
#else
    const uint32_t sign = (static_cast<uint32_t>(pattern) & 0x8000u) << 16, magnitude = pattern & 0x7FFF;
    if (magnitude < 0x0400u) {  // a multiple of 2^-24
      const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
      return pattern_of<float>(pattern_of<uint32_t>(value) | sign);
    }
    // The exponents of infinity and NaN move up once more, from 31 to 255.
    const uint32_t exponents = magnitude >= 0x7C00u ? (255u - 31u) << 23 : (127u - 15u) << 23;
    return pattern_of<float>(((magnitude << 13) + exponents) | sign);
#endif
  }
  static FASTSHAPE_FUNCTION int16_t round(double value) {
#if defined(__CUDA_ARCH__)
    int16_t pattern;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(pattern) : "f"(static_cast<float>(value)));
    return pattern;
#else
    const uint32_t bits = pattern_of<uint32_t>(static_cast<float>(value));
    const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    uint32_t result;
    if (magnitude > 0x7F800000u) {
      result = 0x7E00u;  // NaN
    } else if (magnitude >= 0x477FF000u) {
      result = 0x7C00u;  // 65520 and above: infinity
    } else if (magnitude < 0x38800000u) {
      // Below 2^-14 the dtype has steps of 2^-24. A float has the same steps between 0.5 and 1.
      result = pattern_of<uint32_t>(pattern_of<float>(magnitude) + 0.5f) - 0x3F000000u;
    } else {
      result = (magnitude + 0xFFFu + (magnitude >> 13 & 1u) - ((127u - 15u) << 23)) >> 13;
    }
    return static_cast<int16_t>(result | sign);
#endif
  }
};

// Element `index` of an array of a dtype known at run time.
FASTSHAPE_FUNCTION double load_number(Dtype dtype, const void* array, int64_t index) {
  switch (dtype) {
    case Dtype::kFloat16: return Value<Float16>::load(static_cast<const int16_t*>(array)[index]);
    case Dtype::kBFloat16: return Value<BFloat16>::load(static_cast<const int16_t*>(array)[index]);
    case Dtype::kFloat32: return static_cast<const float*>(array)[index];
    case Dtype::kFloat64: return static_cast<const double*>(array)[index];
    case Dtype::kByte: break;
  }
  return 0;
}

FASTSHAPE_FUNCTION void store_number(Dtype dtype, void* array, int64_t index, double value) {
  switch (dtype) {
    case Dtype::kFloat16: static_cast<int16_t*>(array)[index] = Value<Float16>::round(value); return;
    case Dtype::kBFloat16: static_cast<int16_t*>(array)[index] = Value<BFloat16>::round(value); return;
    case Dtype::kFloat32: static_cast<float*>(array)[index] = static_cast<float>(value); return;
    case Dtype::kFloat64: static_cast<double*>(array)[index] = value; return;
    case Dtype::kByte: return;
  }
}

}  // namespace fastshape
