// AVX-512 kernels, in steps of whole blocks of 64 elements. The plain path does the rest. The mask of a block is one word, and
// parts of it serve directly as predicates of loads, comparisons and stores.
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own headers use vectors that are undefined on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "driver.h"
#include "lanes.h"
#include "top.h"

#if FASTSHAPE_HAS_AVX2
#include <cstring>

#define FASTSHAPE_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,bmi2")))
#define FASTSHAPE_AVX512_INLINE __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,bmi2"), always_inline)) inline

namespace fastshape::cpu {
namespace {

constexpr int kStepBlocks = 4;  // blocks of 64 elements a step

// ---- lanes: `keep` is the predicate of the active lanes; every result is zero in the others ----

template <class Number, int kWidth = sizeof(typename Number::Bits)>
struct Lanes512;

template <class Number>
struct Lanes512<Number, 1> {
  static constexpr int kCount = 64;
  FASTSHAPE_AVX512_INLINE static uint64_t positive(uint64_t keep, __m512i x) { return _mm512_mask_test_epi8_mask(keep, x, x); }
};

template <class Number>
struct Lanes512<Number, 2> {
  static constexpr int kCount = 32;
  FASTSHAPE_AVX512_INLINE static uint64_t positive(uint64_t keep, __m512i x) {
    const __mmask32 above_zero = _mm512_mask_cmpgt_epi16_mask(static_cast<__mmask32>(keep), x, _mm512_setzero_si512());
    return _mm512_mask_cmple_epi16_mask(above_zero, x, _mm512_set1_epi16(Number::kInfinity));
  }
  FASTSHAPE_AVX512_INLINE static uint64_t within_one(uint64_t keep, __m512i x) {
    const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi16(INT16_MAX));
    return _mm512_mask_cmple_epi16_mask(static_cast<__mmask32>(keep), magnitude, _mm512_set1_epi16(Number::kOne));
  }
  FASTSHAPE_AVX512_INLINE static __m512i ones(uint64_t keep) {
    return _mm512_maskz_set1_epi16(static_cast<__mmask32>(keep), Number::kOne);
  }
  FASTSHAPE_AVX512_INLINE static __m512i kept(uint64_t keep, __m512i x) {
    return _mm512_maskz_mov_epi16(static_cast<__mmask32>(keep), x);
  }
};

template <class Number>
struct Lanes512<Number, 4> {
  static constexpr int kCount = 16;
  FASTSHAPE_AVX512_INLINE static uint64_t positive(uint64_t keep, __m512i x) {
    const __mmask16 above_zero = _mm512_mask_cmpgt_epi32_mask(static_cast<__mmask16>(keep), x, _mm512_setzero_si512());
    return _mm512_mask_cmple_epi32_mask(above_zero, x, _mm512_set1_epi32(Number::kInfinity));
  }
  FASTSHAPE_AVX512_INLINE static uint64_t within_one(uint64_t keep, __m512i x) {
    const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi32(INT32_MAX));
    return _mm512_mask_cmple_epi32_mask(static_cast<__mmask16>(keep), magnitude, _mm512_set1_epi32(Number::kOne));
  }
  FASTSHAPE_AVX512_INLINE static __m512i ones(uint64_t keep) {
    return _mm512_maskz_set1_epi32(static_cast<__mmask16>(keep), Number::kOne);
  }
  FASTSHAPE_AVX512_INLINE static __m512i kept(uint64_t keep, __m512i x) {
    return _mm512_maskz_mov_epi32(static_cast<__mmask16>(keep), x);
  }
};

template <class Number>
struct Lanes512<Number, 8> {
  static constexpr int kCount = 8;
  FASTSHAPE_AVX512_INLINE static uint64_t positive(uint64_t keep, __m512i x) {
    const __mmask8 above_zero = _mm512_mask_cmpgt_epi64_mask(static_cast<__mmask8>(keep), x, _mm512_setzero_si512());
    return _mm512_mask_cmple_epi64_mask(above_zero, x, _mm512_set1_epi64(Number::kInfinity));
  }
  FASTSHAPE_AVX512_INLINE static uint64_t within_one(uint64_t keep, __m512i x) {
    const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi64(INT64_MAX));
    return _mm512_mask_cmple_epi64_mask(static_cast<__mmask8>(keep), magnitude, _mm512_set1_epi64(Number::kOne));
  }
  FASTSHAPE_AVX512_INLINE static __m512i ones(uint64_t keep) {
    return _mm512_maskz_set1_epi64(static_cast<__mmask8>(keep), Number::kOne);
  }
  FASTSHAPE_AVX512_INLINE static __m512i kept(uint64_t keep, __m512i x) {
    return _mm512_maskz_mov_epi64(static_cast<__mmask8>(keep), x);
  }
};

// ---- masks ----

// The keys and the threshold of a random mask, as vectors.
struct Draws {
  __m512i key0[kPhiloxRounds], key1[kPhiloxRounds];  // round keys, one copy per lane
  __m512i threshold;
};

FASTSHAPE_AVX512_INLINE Draws draws_of(const Mask& mask) {
  Draws draws;
  uint32_t k0 = static_cast<uint32_t>(mask.seed), k1 = static_cast<uint32_t>(mask.seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    draws.key0[round] = _mm512_set1_epi64(k0);
    draws.key1[round] = _mm512_set1_epi64(k1);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  draws.threshold = _mm512_set1_epi16(static_cast<int16_t>(mask.threshold));
  return draws;
}

// The mask of one step; the eight calls of each vector make one block. Words are in the low half of 64-bit lanes, where the
// 32 x 32 -> 64 bit multiplication reads them; the high half may hold anything. A round is one long chain of dependent
// instructions, so several vectors go through it at once.
FASTSHAPE_AVX512_INLINE void random_blocks(const Mask& mask, const Draws& draws, int64_t byte, uint64_t* bits) {
  constexpr int kXor3 = 0x96;
  const __m512i multiplier0 = _mm512_set1_epi64(kPhiloxMultiplier0), multiplier1 = _mm512_set1_epi64(kPhiloxMultiplier1);
  __m512i c0[kStepBlocks], c1[kStepBlocks], c2[kStepBlocks], c3[kStepBlocks];
  __m512i offset = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(mask.offset + static_cast<uint64_t>(byte))),
                                    _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
  // The first round, where words 2 and 3 are zero.
  for (int v = 0; v < kStepBlocks; ++v) {
    c3[v] = _mm512_mul_epu32(multiplier0, offset);
    c0[v] = _mm512_xor_si512(_mm512_srli_epi64(offset, 32), draws.key0[0]);
    c1[v] = _mm512_setzero_si512();
    c2[v] = _mm512_xor_si512(_mm512_srli_epi64(c3[v], 32), draws.key1[0]);
    offset = _mm512_add_epi64(offset, _mm512_set1_epi64(8));
  }
#pragma GCC unroll 9
  for (int round = 1; round < kPhiloxRounds; ++round) {
    for (int v = 0; v < kStepBlocks; ++v) {
      const __m512i product0 = _mm512_mul_epu32(multiplier0, c0[v]), product1 = _mm512_mul_epu32(multiplier1, c2[v]);
      c0[v] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product1, 32), c1[v], draws.key0[round], kXor3);
      c2[v] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), c3[v], draws.key1[round], kXor3);
      c1[v] = product1;
      c3[v] = product0;
    }
  }
  for (int v = 0; v < kStepBlocks; ++v) {
    // `first` has elements 0 to 3 of each call, `second` 4 to 7: the two halves of each mask byte, which pdep interleaves.
    const __m512i first = _mm512_mask_blend_epi32(0xAAAA, c0[v], _mm512_slli_epi64(c1[v], 32));
    const __m512i second = _mm512_mask_blend_epi32(0xAAAA, c2[v], _mm512_slli_epi64(c3[v], 32));
    const uint64_t low = _mm512_cmpge_epu16_mask(first, draws.threshold), high = _mm512_cmpge_epu16_mask(second, draws.threshold);
    bits[v] = _pdep_u64(low, 0x0F0F0F0F0F0F0F0Full) | _pdep_u64(high, 0xF0F0F0F0F0F0F0F0ull);
  }
}

// The mask of one step: bit k of bits[b] belongs to element 8 * byte + 64 * b + k.
template <MaskSource kSource>
FASTSHAPE_AVX512_INLINE void mask_blocks(const Mask& mask, const Draws& draws, int64_t byte, uint64_t* bits) {
  if (kSource == MaskSource::kRandom) {
    random_blocks(mask, draws, byte, bits);
  } else if (kSource == MaskSource::kBits) {
    std::memcpy(bits, mask.bits + byte, kStepBlocks * sizeof(uint64_t));
  } else {
    for (int b = 0; b < kStepBlocks; ++b) bits[b] = ~uint64_t{0};
  }
}

// ---- kernels ----

struct Path {
  static constexpr int64_t kStepBytes = 8 * kStepBlocks;  // mask bytes

  template <class Number, bool kBinarize, bool kWithinOne, MaskSource kSource>
  FASTSHAPE_AVX512 static void shape(const ShapeArguments& call, const Mask& mask, Range range) {
    using L = Lanes512<Number>;
    using Bits = typename Number::Bits;
    const Draws draws = draws_of(mask);
    for (int64_t byte = range.first; byte < range.last; byte += kStepBytes) {
      if (kSource == MaskSource::kRandom) {
        look_ahead<8 * kStepBytes>(static_cast<const Bits*>(call.x) + 8 * byte);
        if (call.y != call.x) look_ahead<8 * kStepBytes>(static_cast<const Bits*>(call.y) + 8 * byte);
      }
      uint64_t keeps[kStepBlocks];
      mask_blocks<kSource>(mask, draws, byte, keeps);
      for (int b = 0; b < kStepBlocks; ++b) {
        const Bits* x = static_cast<const Bits*>(call.x) + 8 * byte + 64 * b;
        Bits* y = static_cast<Bits*>(call.y) + 8 * byte + 64 * b;
        uint64_t within_one = 0;
#pragma GCC unroll 8
        for (int k = 0; k < 64; k += L::kCount) {
          const __m512i value = _mm512_loadu_si512(x + k);
          const uint64_t keep = keeps[b] >> k;
          if (kWithinOne) within_one |= L::within_one(keep, value) << k;
          _mm512_storeu_si512(y + k, kBinarize ? L::ones(L::positive(keep, value)) : L::kept(keep, value));
        }
        if (kWithinOne) std::memcpy(call.within_one + byte + 8 * b, &within_one, sizeof within_one);
      }
    }
  }

  template <class Number, bool kWithinOne, MaskSource kSource>
  FASTSHAPE_AVX512 static void ones(const OnesArguments& call, const Mask& mask, Range range) {
    using L = Lanes512<Number>;
    using Bits = typename Number::Bits;
    const Draws draws = draws_of(mask);
    for (int64_t byte = range.first; byte < range.last; byte += kStepBytes) {
      if (kSource == MaskSource::kRandom) look_ahead<8 * kStepBytes>(static_cast<const Bits*>(call.x) + 8 * byte);
      uint64_t keep[kStepBlocks], ones[kStepBlocks] = {}, within_one[kStepBlocks] = {};
      mask_blocks<kSource>(mask, draws, byte, keep);
      for (int b = 0; b < kStepBlocks; ++b) {
        const Bits* x = static_cast<const Bits*>(call.x) + 8 * byte + 64 * b;
#pragma GCC unroll 8
        for (int k = 0; k < 64; k += L::kCount) {
          const __m512i value = _mm512_loadu_si512(x + k);
          ones[b] |= L::positive(keep[b] >> k, value) << k;
          if (kWithinOne) within_one[b] |= L::within_one(keep[b] >> k, value) << k;
        }
      }
      std::memcpy(call.ones + byte, ones, sizeof ones);
      if (kWithinOne) std::memcpy(call.within_one + byte, within_one, sizeof within_one);
    }
  }

  template <class Number>
  FASTSHAPE_AVX512 static void pack(const typename Number::Bits* x, uint8_t* bits, Range range) {
    using L = Lanes512<Number>;
    for (int64_t byte = range.first; byte < range.last; byte += 8) {
      uint64_t packed = 0;
#pragma GCC unroll 8
      for (int k = 0; k < 64; k += L::kCount) packed |= L::positive(~uint64_t{0}, _mm512_loadu_si512(x + 8 * byte + k)) << k;
      std::memcpy(bits + byte, &packed, sizeof packed);
    }
  }

  template <MaskSource kSource>
  FASTSHAPE_AVX512 static void pack_random(const Mask& mask, uint8_t* bits, Range range) {
    const Draws draws = draws_of(mask);
    for (int64_t byte = range.first; byte < range.last; byte += kStepBytes) {
      uint64_t packed[kStepBlocks];
      mask_blocks<kSource>(mask, draws, byte, packed);
      std::memcpy(bits + byte, packed, sizeof packed);
    }
  }

  // With AVX-512 compilers make slower code of it.
  template <class Number>
  FASTSHAPE_AVX2 static void pack_top(const TopArguments& call, Range range) {
    pack_top_of<Number>(call, range);
  }
};

}  // namespace

const Kernels* avx512_kernels() {
  static const Kernels kernels = Driver<Path>::kernels("avx512");
  const bool supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                         __builtin_cpu_supports("bmi2");
  return supported ? &kernels : nullptr;
}

}  // namespace fastshape::cpu

#else

namespace fastshape::cpu {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace fastshape::cpu

#endif
