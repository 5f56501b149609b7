// AVX2 kernels, in steps of whole blocks of 64 elements. The plain path does the rest.
#include "driver.h"
#include "lanes.h"
#include "top.h"

#if FASTSHAPE_HAS_AVX2
#include <cstring>


namespace fastshape::cpu {
namespace {

constexpr int kStepBlocks = 2;  // blocks of 64 elements a step

// ---- masks ----

// The keys and the threshold of a random mask, as vectors.
struct Draws {
  __m256i key0[kPhiloxRounds], key1[kPhiloxRounds];  // round keys, one copy per lane
  __m256i threshold;
};

FASTSHAPE_AVX2_INLINE Draws draws_of(const Mask& mask) {
  Draws draws;
  uint32_t k0 = static_cast<uint32_t>(mask.seed), k1 = static_cast<uint32_t>(mask.seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    draws.key0[round] = _mm256_set1_epi64x(k0);
    draws.key1[round] = _mm256_set1_epi64x(k1);
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  draws.threshold = _mm256_set1_epi16(static_cast<int16_t>(mask.threshold));
  return draws;
}

// 32 mask bits from the words of four Philox calls. Each 64-bit lane holds one call, each word in the low half of its lane.
FASTSHAPE_AVX2_INLINE uint32_t bits_of(__m256i c0, __m256i c1, __m256i c2, __m256i c3, __m256i threshold) {
  // Each vector has sixteen 16-bit draws: `first` those of elements 0 to 3 of each call, `second` those of 4 to 7.
  const __m256i first = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
  const __m256i second = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
  const __m256i keep_first = _mm256_cmpeq_epi16(_mm256_max_epu16(first, threshold), first);
  const __m256i keep_second = _mm256_cmpeq_epi16(_mm256_max_epu16(second, threshold), second);
  // Narrowing puts the first halves of two calls before their second halves. Swapping the middle two restores the order.
  const __m256i bytes = _mm256_shuffle_epi32(_mm256_packs_epi16(keep_first, keep_second), _MM_SHUFFLE(3, 1, 2, 0));
  return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
}

// The mask of one step. Words are in the low half of 64-bit lanes, where the 32 x 32 -> 64 bit multiplication reads them; the
// high half may hold anything. A round is one long chain of dependent instructions, so several vectors go through it at once.
FASTSHAPE_AVX2_INLINE void random_blocks(const Mask& mask, const Draws& draws, int64_t byte, uint64_t* bits) {
  constexpr int kVectors = 2 * kStepBlocks;
  const __m256i multiplier0 = _mm256_set1_epi64x(kPhiloxMultiplier0), multiplier1 = _mm256_set1_epi64x(kPhiloxMultiplier1);
  __m256i c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
  __m256i offset = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(mask.offset + static_cast<uint64_t>(byte))),
                                    _mm256_setr_epi64x(0, 1, 2, 3));
  // The first round, where words 2 and 3 are zero.
  for (int v = 0; v < kVectors; ++v) {
    c3[v] = _mm256_mul_epu32(multiplier0, offset);
    c0[v] = _mm256_xor_si256(_mm256_srli_epi64(offset, 32), draws.key0[0]);
    c1[v] = _mm256_setzero_si256();
    c2[v] = _mm256_xor_si256(_mm256_srli_epi64(c3[v], 32), draws.key1[0]);
    offset = _mm256_add_epi64(offset, _mm256_set1_epi64x(4));
  }
#pragma GCC unroll 9
  for (int round = 1; round < kPhiloxRounds; ++round) {
    for (int v = 0; v < kVectors; ++v) {
      const __m256i product0 = _mm256_mul_epu32(multiplier0, c0[v]), product1 = _mm256_mul_epu32(multiplier1, c2[v]);
      c0[v] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), c1[v]), draws.key0[round]);
      c2[v] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), c3[v]), draws.key1[round]);
      c1[v] = product1;
      c3[v] = product0;
    }
  }
  for (int b = 0; b < kStepBlocks; ++b) {
    const uint64_t low = bits_of(c0[2 * b], c1[2 * b], c2[2 * b], c3[2 * b], draws.threshold);
    const uint64_t high = bits_of(c0[2 * b + 1], c1[2 * b + 1], c2[2 * b + 1], c3[2 * b + 1], draws.threshold);
    bits[b] = low | high << 32;
  }
}

// The mask of one step: bit k of bits[b] belongs to element 8 * byte + 64 * b + k.
template <MaskSource kSource>
FASTSHAPE_AVX2_INLINE void mask_blocks(const Mask& mask, const Draws& draws, int64_t byte, uint64_t* bits) {
  if (kSource == MaskSource::kRandom) {
    random_blocks(mask, draws, byte, bits);
  } else if (kSource == MaskSource::kBits) {
    std::memcpy(bits, mask.bits + byte, kStepBlocks * sizeof(uint64_t));
  } else {
    for (int b = 0; b < kStepBlocks; ++b) bits[b] = ~uint64_t{0};
  }
}

// ---- kernels ----

template <class Number, bool kBinarize, bool kWithinOne>
FASTSHAPE_AVX2_INLINE void shape_block(const ShapeArguments& call, int64_t byte, uint64_t mask) {
  using L = Lanes<Number>;
  using Bits = typename Number::Bits;
  const Bits* x = static_cast<const Bits*>(call.x) + 8 * byte;
  Bits* y = static_cast<Bits*>(call.y) + 8 * byte;
  uint64_t within_one = 0;
#pragma GCC unroll 16
  for (int k = 0; k < 64; k += L::kCount) {
    const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + k));
    const __m256i keep = L::keep(mask >> k);
    if (kWithinOne) within_one |= L::bits(_mm256_andnot_si256(L::above_one(value), keep)) << k;
    const __m256i shaped = kBinarize ? _mm256_and_si256(L::positive(value), L::one()) : value;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + k), _mm256_and_si256(shaped, keep));
  }
  if (kWithinOne) std::memcpy(call.within_one + byte, &within_one, sizeof within_one);
}

struct Path {
  static constexpr int64_t kStepBytes = 8 * kStepBlocks;  // mask bytes

  template <class Number, bool kBinarize, bool kWithinOne, MaskSource kSource>
  FASTSHAPE_AVX2 static void shape(const ShapeArguments& call, const Mask& mask, Range range) {
    using Bits = typename Number::Bits;
    const Draws draws = draws_of(mask);
    for (int64_t byte = range.first; byte < range.last; byte += kStepBytes) {
      if (kSource == MaskSource::kRandom) {
        look_ahead<8 * kStepBytes>(static_cast<const Bits*>(call.x) + 8 * byte);
        if (call.y != call.x) look_ahead<8 * kStepBytes>(static_cast<const Bits*>(call.y) + 8 * byte);
      }
      uint64_t keep[kStepBlocks];
      mask_blocks<kSource>(mask, draws, byte, keep);
      for (int b = 0; b < kStepBlocks; ++b) shape_block<Number, kBinarize, kWithinOne>(call, byte + 8 * b, keep[b]);
    }
  }

  template <class Number, bool kWithinOne, MaskSource kSource>
  FASTSHAPE_AVX2 static void ones(const OnesArguments& call, const Mask& mask, Range range) {
    using L = Lanes<Number>;
    using Bits = typename Number::Bits;
    const Draws draws = draws_of(mask);
    for (int64_t byte = range.first; byte < range.last; byte += kStepBytes) {
      if (kSource == MaskSource::kRandom) look_ahead<8 * kStepBytes>(static_cast<const Bits*>(call.x) + 8 * byte);
      uint64_t ones[kStepBlocks], within_one[kStepBlocks] = {}, keep[kStepBlocks];
      mask_blocks<kSource>(mask, draws, byte, keep);
      for (int b = 0; b < kStepBlocks; ++b) {
        const Bits* x = static_cast<const Bits*>(call.x) + 8 * (byte + 8 * b);
        ones[b] = 0;
#pragma GCC unroll 16
        for (int k = 0; k < 64; k += L::kCount) {
          const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + k));
          ones[b] |= L::bits(L::positive(value)) << k;
          if (kWithinOne) within_one[b] |= (L::bits(L::above_one(value)) ^ ((1ull << L::kCount) - 1)) << k;
        }
        ones[b] &= keep[b];
        within_one[b] &= keep[b];
      }
      std::memcpy(call.ones + byte, ones, sizeof ones);
      if (kWithinOne) std::memcpy(call.within_one + byte, within_one, sizeof within_one);
    }
  }

  template <class Number>
  FASTSHAPE_AVX2 static void pack(const typename Number::Bits* x, uint8_t* bits, Range range) {
    using L = Lanes<Number>;
    for (int64_t byte = range.first; byte < range.last; byte += 8) {
      uint64_t packed = 0;
#pragma GCC unroll 16
      for (int k = 0; k < 64; k += L::kCount)
        packed |= L::bits(L::positive(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 8 * byte + k)))) << k;
      std::memcpy(bits + byte, &packed, sizeof packed);
    }
  }

  template <MaskSource kSource>
  FASTSHAPE_AVX2 static void pack_random(const Mask& mask, uint8_t* bits, Range range) {
    const Draws draws = draws_of(mask);
    for (int64_t byte = range.first; byte < range.last; byte += kStepBytes) {
      uint64_t packed[kStepBlocks];
      mask_blocks<kSource>(mask, draws, byte, packed);
      std::memcpy(bits + byte, packed, sizeof packed);
    }
  }

  template <class Number>
  FASTSHAPE_AVX2 static void pack_top(const TopArguments& call, Range range) {
    pack_top_of<Number>(call, range);
  }
};

}  // namespace

const Kernels* avx2_kernels() {
  static const Kernels kernels = Driver<Path>::kernels("avx2");
  return has_avx2() ? &kernels : nullptr;
}

}  // namespace fastshape::cpu

#else

namespace fastshape::cpu {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace fastshape::cpu

#endif
