// AVX2, in steps of whole blocks of 64 elements; what is left goes the plain path. Each function names its target, so
// that nothing else in this file can be compiled to instructions an older processor lacks.
#include "kernels.h"

#if (defined(__x86_64__) || defined(__i386__)) && (defined(__GNUC__) || defined(__clang__))
#define FASTSHAPE_HAS_AVX2 1
#else
#define FASTSHAPE_HAS_AVX2 0
#endif

#if FASTSHAPE_HAS_AVX2
#include <immintrin.h>

#include <cstring>

#include "dispatch.h"

#define FASTSHAPE_AVX2 __attribute__((target("avx2")))
#define FASTSHAPE_AVX2_INLINE __attribute__((target("avx2"), always_inline)) inline

namespace fastshape::cpu {
namespace {

constexpr int kStepBlocks = 2;                    // blocks of 64 elements a step
constexpr int64_t kStepBytes = 8 * kStepBlocks;  // their mask bytes

// ---- lanes: what one vector of each width can do. A lane mask is all ones or all zeros. ----

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

// ---- masks ----

// A random mask as vectors: what every block of it needs.
struct Draws {
  __m256i key0[kPhiloxRounds], key1[kPhiloxRounds];  // round keys, one copy a lane
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

// 32 mask bits from the words of four Philox calls, a call a lane, each word in the low half of its lane.
FASTSHAPE_AVX2_INLINE uint32_t bits_of(__m256i c0, __m256i c1, __m256i c2, __m256i c3, __m256i threshold) {
  // Sixteen 16-bit draws a vector: elements 0 to 3 of each call in `first`, 4 to 7 in `second`.
  const __m256i first = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
  const __m256i second = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
  const __m256i keep_first = _mm256_cmpeq_epi16(_mm256_max_epu16(first, threshold), first);
  const __m256i keep_second = _mm256_cmpeq_epi16(_mm256_max_epu16(second, threshold), second);
  // Narrowing puts both calls' first halves before their second halves: swap the middle two to have calls in order.
  const __m256i bytes = _mm256_shuffle_epi32(_mm256_packs_epi16(keep_first, keep_second), _MM_SHUFFLE(3, 1, 2, 0));
  return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
}

// The mask of one step. Words live in the low half of 64-bit lanes: that is where the 32 x 32 -> 64 bit
// multiplication reads them, and where xor may leave rubbish above without harm. A round is one long chain of
// dependent steps, so several calls go through it side by side.
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

// The part of a range that whole steps fill; the rest is the plain path's.
int64_t end_of_steps(int64_t n, Range range) {
  const int64_t full_bytes = n / 8 < range.last ? n / 8 : range.last;
  return full_bytes <= range.first ? range.first : range.first + (full_bytes - range.first) / kStepBytes * kStepBytes;
}

// 65536 does not fit the 16-bit comparison. It keeps nothing, and nobody asks for it: the plain path serves.
bool takes_plain_path(const Mask& mask) { return mask.source == MaskSource::kRandom && mask.threshold > 0xFFFF; }

template <class Number, bool kBinarize, bool kWithinOne>
FASTSHAPE_AVX2_INLINE void shape_block(const Shape& call, int64_t byte, uint64_t mask) {
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

template <class Number, bool kBinarize, bool kWithinOne, MaskSource kSource>
FASTSHAPE_AVX2 void shape_steps(const Shape& call, Range range) {
  const Draws draws = draws_of(call.mask);
  for (int64_t byte = range.first; byte < range.last; byte += kStepBytes) {
    uint64_t mask[kStepBlocks];
    mask_blocks<kSource>(call.mask, draws, byte, mask);
    for (int b = 0; b < kStepBlocks; ++b) shape_block<Number, kBinarize, kWithinOne>(call, byte + 8 * b, mask[b]);
  }
}

void shape(const Shape& call, Range range) {
  if (takes_plain_path(call.mask)) return plain_kernels().shape(call, range);
  const int64_t middle = end_of_steps(call.n, range);
  with_shape(call, [&](auto number, auto binarize, auto within_one, auto source) {
    shape_steps<decltype(number), binarize.value, within_one.value, source.value>(call, {range.first, middle});
  });
  plain_kernels().shape(call, {middle, range.last});
}

template <class Number>
FASTSHAPE_AVX2 void pack_steps(const typename Number::Bits* x, uint8_t* bits, Range range) {
  using L = Lanes<Number>;
  for (int64_t byte = range.first; byte < range.last; byte += 8) {
    uint64_t packed = 0;
#pragma GCC unroll 16
    for (int k = 0; k < 64; k += L::kCount)
      packed |= L::bits(L::positive(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 8 * byte + k)))) << k;
    std::memcpy(bits + byte, &packed, sizeof packed);
  }
}

void pack(Dtype dtype, const void* x, uint8_t* bits, int64_t n, Range range) {
  const int64_t middle = end_of_steps(n, range);
  with_number(dtype, [&](auto number) {
    using Number = decltype(number);
    pack_steps<Number>(static_cast<const typename Number::Bits*>(x), bits, {range.first, middle});
  });
  plain_kernels().pack(dtype, x, bits, n, {middle, range.last});
}

template <MaskSource kSource>
FASTSHAPE_AVX2 void pack_random_steps(const Mask& mask, uint8_t* bits, Range range) {
  const Draws draws = draws_of(mask);
  for (int64_t byte = range.first; byte < range.last; byte += kStepBytes) {
    uint64_t packed[kStepBlocks];
    mask_blocks<kSource>(mask, draws, byte, packed);
    std::memcpy(bits + byte, packed, sizeof packed);
  }
}

void pack_random(const Mask& mask, uint8_t* bits, int64_t n, Range range) {
  if (takes_plain_path(mask)) return plain_kernels().pack_random(mask, bits, n, range);
  const int64_t middle = end_of_steps(n, range);
  with_source(mask.source, [&](auto source) { pack_random_steps<source.value>(mask, bits, {range.first, middle}); });
  plain_kernels().pack_random(mask, bits, n, {middle, range.last});
}

}  // namespace

const Kernels* avx2_kernels() {
  static const Kernels kernels = {"avx2", shape, pack, pack_random, plain_kernels().unpack};
  return __builtin_cpu_supports("avx2") ? &kernels : nullptr;
}

}  // namespace fastshape::cpu

#else

namespace fastshape::cpu {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace fastshape::cpu

#endif
