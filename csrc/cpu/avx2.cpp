// AVX2: 64 elements, eight mask bytes, at a time; what is left goes the plain path. Each function names its target, so
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

constexpr int64_t kBlockBytes = 8;  // mask bytes a block: 64 elements

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

// Four Philox calls side by side, each word in the low half of a 64-bit lane: that is where the 32 x 32 -> 64 bit
// multiplication reads it, and where xor may leave rubbish above without harm. Returns four mask bytes.
FASTSHAPE_AVX2_INLINE uint32_t four_random_bytes(const Mask& mask, __m256i offsets, __m256i threshold) {
  const __m256i multiplier0 = _mm256_set1_epi64x(kPhiloxMultiplier0), multiplier1 = _mm256_set1_epi64x(kPhiloxMultiplier1);
  uint32_t k0 = static_cast<uint32_t>(mask.seed), k1 = static_cast<uint32_t>(mask.seed >> 32);
  __m256i c0 = offsets, c1 = _mm256_srli_epi64(offsets, 32);
  __m256i c2 = _mm256_setzero_si256(), c3 = _mm256_setzero_si256();
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const __m256i product0 = _mm256_mul_epu32(multiplier0, c0), product1 = _mm256_mul_epu32(multiplier1, c2);
    c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product1, 32), c1), _mm256_set1_epi64x(k0));
    c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(product0, 32), c3), _mm256_set1_epi64x(k1));
    c1 = product1;
    c3 = product0;
    k0 += kPhiloxWeyl0;
    k1 += kPhiloxWeyl1;
  }
  // Sixteen 16-bit draws a vector: elements 0 to 3 of each call in `first`, 4 to 7 in `second`.
  const __m256i first = _mm256_blend_epi32(c0, _mm256_slli_epi64(c1, 32), 0xAA);
  const __m256i second = _mm256_blend_epi32(c2, _mm256_slli_epi64(c3, 32), 0xAA);
  const __m256i keep_first = _mm256_cmpeq_epi16(_mm256_max_epu16(first, threshold), first);
  const __m256i keep_second = _mm256_cmpeq_epi16(_mm256_max_epu16(second, threshold), second);
  // Narrowing puts both calls' first halves before their second halves: swap the middle two to have calls in order.
  const __m256i bytes = _mm256_shuffle_epi32(_mm256_packs_epi16(keep_first, keep_second), _MM_SHUFFLE(3, 1, 2, 0));
  return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
}

// The mask of 64 elements: bit k belongs to element 8 * byte + k.
template <MaskSource kSource>
FASTSHAPE_AVX2_INLINE uint64_t mask_block(const Mask& mask, int64_t byte) {
  if (kSource == MaskSource::kRandom) {
    if (mask.threshold > 0xFFFF) return 0;  // does not fit the 16-bit comparison, and keeps nothing
    const __m256i threshold = _mm256_set1_epi16(static_cast<int16_t>(mask.threshold));
    const uint64_t base = mask.offset + static_cast<uint64_t>(byte);
    const __m256i low = _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(base)), _mm256_setr_epi64x(0, 1, 2, 3));
    const __m256i high = _mm256_add_epi64(low, _mm256_set1_epi64x(4));
    const uint64_t low_bits = four_random_bytes(mask, low, threshold);
    return low_bits | static_cast<uint64_t>(four_random_bytes(mask, high, threshold)) << 32;
  }
  if (kSource == MaskSource::kBits) {
    uint64_t bits;
    std::memcpy(&bits, mask.bits + byte, sizeof bits);
    return bits;
  }
  return ~uint64_t{0};
}

// ---- kernels ----

// The part of a range that whole blocks fill; the rest is the plain path's.
int64_t end_of_blocks(int64_t n, Range range) {
  const int64_t full_bytes = n / 8 < range.last ? n / 8 : range.last;
  return full_bytes <= range.first ? range.first : range.first + (full_bytes - range.first) / kBlockBytes * kBlockBytes;
}

template <class Number, bool kBinarize, bool kWithinOne, MaskSource kSource>
FASTSHAPE_AVX2 void shape_blocks(const Shape& call, Range range) {
  using L = Lanes<Number>;
  using Bits = typename Number::Bits;
  const Bits* x = static_cast<const Bits*>(call.x);
  Bits* y = static_cast<Bits*>(call.y);
  for (int64_t byte = range.first; byte < range.last; byte += kBlockBytes) {
    const uint64_t mask = mask_block<kSource>(call.mask, byte);
    uint64_t within_one = 0;
#pragma GCC unroll 16
    for (int k = 0; k < 64; k += L::kCount) {
      const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 8 * byte + k));
      const __m256i keep = L::keep(mask >> k);
      if (kWithinOne) within_one |= L::bits(_mm256_andnot_si256(L::above_one(value), keep)) << k;
      const __m256i shaped = kBinarize ? _mm256_and_si256(L::positive(value), L::one()) : value;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + 8 * byte + k), _mm256_and_si256(shaped, keep));
    }
    if (kWithinOne) std::memcpy(call.within_one + byte, &within_one, sizeof within_one);
  }
}

void shape(const Shape& call, Range range) {
  const int64_t middle = end_of_blocks(call.n, range);
  with_shape(call, [&](auto number, auto binarize, auto within_one, auto source) {
    shape_blocks<decltype(number), binarize.value, within_one.value, source.value>(call, {range.first, middle});
  });
  plain_kernels().shape(call, {middle, range.last});
}

template <class Number>
FASTSHAPE_AVX2 void pack_blocks(const typename Number::Bits* x, uint8_t* bits, Range range) {
  using L = Lanes<Number>;
  for (int64_t byte = range.first; byte < range.last; byte += kBlockBytes) {
    uint64_t packed = 0;
#pragma GCC unroll 16
    for (int k = 0; k < 64; k += L::kCount)
      packed |= L::bits(L::positive(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 8 * byte + k)))) << k;
    std::memcpy(bits + byte, &packed, sizeof packed);
  }
}

void pack(Dtype dtype, const void* x, uint8_t* bits, int64_t n, Range range) {
  const int64_t middle = end_of_blocks(n, range);
  with_number(dtype, [&](auto number) {
    using Number = decltype(number);
    pack_blocks<Number>(static_cast<const typename Number::Bits*>(x), bits, {range.first, middle});
  });
  plain_kernels().pack(dtype, x, bits, n, {middle, range.last});
}

template <MaskSource kSource>
FASTSHAPE_AVX2 void pack_random_blocks(const Mask& mask, uint8_t* bits, Range range) {
  for (int64_t byte = range.first; byte < range.last; byte += kBlockBytes) {
    const uint64_t packed = mask_block<kSource>(mask, byte);
    std::memcpy(bits + byte, &packed, sizeof packed);
  }
}

void pack_random(const Mask& mask, uint8_t* bits, int64_t n, Range range) {
  const int64_t middle = end_of_blocks(n, range);
  with_source(mask.source, [&](auto source) { pack_random_blocks<source.value>(mask, bits, {range.first, middle}); });
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
