// Operations of one AVX2 vector on the bit patterns of a dtype. Each function names its target instruction set. So the other
// code of a file that includes this header is not compiled to instructions that an older processor lacks.
#pragma once

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define FASTSHAPE_HAS_AVX2 1
#else
#define FASTSHAPE_HAS_AVX2 0
#endif

#if FASTSHAPE_HAS_AVX2
#include <immintrin.h>

#include <cstdint>

#include "fastshape/shaping.h"

#define FASTSHAPE_AVX2 __attribute__((target("avx2,f16c,popcnt")))
#define FASTSHAPE_AVX2_INLINE __attribute__((target("avx2,f16c,popcnt"), always_inline)) inline

namespace fastshape::cpu {

inline bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
}

// A lane mask has all ones or all zeros in each lane. `keep` turns bits into a lane mask, and `bits` turns it back.
template <class Number, int kWidth = sizeof(typename Number::Bits)>
struct Lanes;

template <class Number>
struct Lanes<Number, 1> {
  static constexpr int kCount = 32;
  FASTSHAPE_AVX2_INLINE static __m256i positive(__m256i x) {
    return _mm256_xor_si256(_mm256_cmpeq_epi8(x, _mm256_setzero_si256()), _mm256_set1_epi8(-1));
  }
  FASTSHAPE_AVX2_INLINE static uint64_t bits(__m256i lanes) { return static_cast<uint32_t>(_mm256_movemask_epi8(lanes)); }
};

template <class Number>
struct Lanes<Number, 2> {
  static constexpr int kCount = 16;
  FASTSHAPE_AVX2_INLINE static __m256i all(int16_t value) { return _mm256_set1_epi16(value); }
  FASTSHAPE_AVX2_INLINE static __m256i one() { return _mm256_set1_epi16(Number::kOne); }
  FASTSHAPE_AVX2_INLINE static __m256i keep(uint64_t bits) {
    const __m256i lane_bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
    return _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(static_cast<int16_t>(bits)), lane_bit), lane_bit);
  }
  FASTSHAPE_AVX2_INLINE static __m256i positive(__m256i x) {
    const __m256i above_infinity = _mm256_cmpgt_epi16(x, _mm256_set1_epi16(Number::kInfinity));
    return _mm256_andnot_si256(above_infinity, _mm256_cmpgt_epi16(x, _mm256_setzero_si256()));
  }
  FASTSHAPE_AVX2_INLINE static __m256i above_one(__m256i x) {
    return _mm256_cmpgt_epi16(_mm256_and_si256(x, _mm256_set1_epi16(INT16_MAX)), one());
  }
  FASTSHAPE_AVX2_INLINE static uint64_t bits(__m256i lanes) {
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
    return static_cast<uint32_t>(_mm_movemask_epi8(bytes));
  }
};

template <class Number>
struct Lanes<Number, 4> {
  static constexpr int kCount = 8;
  FASTSHAPE_AVX2_INLINE static __m256i all(int32_t value) { return _mm256_set1_epi32(value); }
  FASTSHAPE_AVX2_INLINE static __m256i one() { return _mm256_set1_epi32(Number::kOne); }
  FASTSHAPE_AVX2_INLINE static __m256i keep(uint64_t bits) {
    const __m256i lane_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int32_t>(bits)), lane_bit), lane_bit);
  }
  FASTSHAPE_AVX2_INLINE static __m256i positive(__m256i x) {
    const __m256i above_infinity = _mm256_cmpgt_epi32(x, _mm256_set1_epi32(Number::kInfinity));
    return _mm256_andnot_si256(above_infinity, _mm256_cmpgt_epi32(x, _mm256_setzero_si256()));
  }
  FASTSHAPE_AVX2_INLINE static __m256i above_one(__m256i x) {
    return _mm256_cmpgt_epi32(_mm256_and_si256(x, _mm256_set1_epi32(INT32_MAX)), one());
  }
  FASTSHAPE_AVX2_INLINE static uint64_t bits(__m256i lanes) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(lanes)));
  }
};

template <class Number>
struct Lanes<Number, 8> {
  static constexpr int kCount = 4;
  FASTSHAPE_AVX2_INLINE static __m256i all(int64_t value) { return _mm256_set1_epi64x(value); }
  FASTSHAPE_AVX2_INLINE static __m256i one() { return _mm256_set1_epi64x(Number::kOne); }
  FASTSHAPE_AVX2_INLINE static __m256i keep(uint64_t bits) {
    const __m256i lane_bit = _mm256_setr_epi64x(1, 2, 4, 8);
    return _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(static_cast<int64_t>(bits)), lane_bit), lane_bit);
  }
  FASTSHAPE_AVX2_INLINE static __m256i positive(__m256i x) {
    const __m256i above_infinity = _mm256_cmpgt_epi64(x, _mm256_set1_epi64x(Number::kInfinity));
    return _mm256_andnot_si256(above_infinity, _mm256_cmpgt_epi64(x, _mm256_setzero_si256()));
  }
  FASTSHAPE_AVX2_INLINE static __m256i above_one(__m256i x) {
    return _mm256_cmpgt_epi64(_mm256_and_si256(x, _mm256_set1_epi64x(INT64_MAX)), one());
  }
  FASTSHAPE_AVX2_INLINE static uint64_t bits(__m256i lanes) {
    return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(lanes)));
  }
};

}  // namespace fastshape::cpu
#endif
