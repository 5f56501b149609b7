// AVX2 kernels. A step is 32 elements, whose bits come from one read. It may begin at any bit of a byte.
#include "batch_norm.h"
#include "lanes.h"

#if FASTSHAPE_HAS_AVX2

namespace fastshape::cpu {
namespace {

constexpr int64_t kStep = 32;

FASTSHAPE_AVX2_INLINE uint64_t lowest(uint64_t word, int64_t bits) { return word & ((1ull << bits) - 1); }

// ---- count ----

FASTSHAPE_AVX2 int64_t ones_between(const BitReader& reader, int64_t first, int64_t last) {
  constexpr int64_t kBits = 56;
  int64_t ones = 0;
  for (; first + kBits <= last; first += kBits) ones += __builtin_popcountll(lowest(reader.from(first), kBits));
  return ones + (first < last ? __builtin_popcountll(lowest(reader.from(first), last - first)) : 0);
}

// Counts the ones of 32 channels, one byte per channel. 255 rows cannot overflow a byte.
FASTSHAPE_AVX2 void count_rows(const BitReader& reader, int64_t n, int64_t count, int64_t channel, int64_t* counts) {
  const __m256i own_byte = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
  const __m256i own_bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));
  const int64_t lanes = std::min(count - channel, kStep);
  for (int64_t row = channel; row < n;) {
    __m256i sum = _mm256_setzero_si256();
    for (int rows = 0; rows < 255 && row < n; ++rows, row += count) {
      const __m256i word = _mm256_set1_epi32(static_cast<int32_t>(reader.from(row)));
      const __m256i bit = _mm256_and_si256(_mm256_shuffle_epi8(word, own_byte), own_bit);
      sum = _mm256_sub_epi8(sum, _mm256_cmpeq_epi8(bit, own_bit));
    }
    alignas(32) uint8_t lane[kStep];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lane), sum);
    for (int64_t k = 0; k < lanes; ++k) counts[channel + k] += lane[k];
  }
}

void count(const uint8_t* ones, int64_t n, const Channels& channels, int64_t* counts, Range range) {
  const BitReader reader{ones, bytes_for(n)};
  std::fill(counts + range.first, counts + range.last, 0);
  if (channels.inner == 1) {
    // A step writes the counts of 32 channels, so that a range must begin and end between steps; the glue sees to that.
    for (int64_t c = range.first; c < range.last; c += kStep) count_rows(reader, n, channels.count, c, counts);
    return;
  }
  for (int64_t image = 0; image < n; image += channels.count * channels.inner)
    for (int64_t c = range.first; c < range.last; ++c) {
      const int64_t first = image + c * channels.inner;
      counts[c] += ones_between(reader, first, first + channels.inner);
    }
}

// ---- look_up ----

template <class Number, bool kPlanes>
struct LookUp {
  using L = Lanes<Number>;
  using Bits = typename Number::Bits;
  BitReader ones;
  const Bits* table;
  Bits* y;
  int64_t count;

  template <int kElements>
  FASTSHAPE_AVX2_INLINE void step(int64_t i, uint64_t bits, const Bits* zero, const Bits* one) const {
#pragma GCC unroll 8
    for (int k = 0; k < kElements; k += L::kCount) {
      const int at = kPlanes ? 0 : k;
      const __m256i zeros = kPlanes ? L::all(*zero) : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(zero + at));
      const __m256i ones = kPlanes ? L::all(*one) : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(one + at));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i + k), _mm256_blendv_epi8(zeros, ones, L::keep(bits >> k)));
    }
  }

  FASTSHAPE_AVX2 void operator()(int64_t i, int64_t last, int64_t channel) const {
    const Bits *zero = table + channel, *one = zero + count;
    for (; i + kStep <= last; i += kStep) {
      step<kStep>(i, ones.from(i), zero, one);
      if (!kPlanes) zero += kStep, one += kStep;
    }
    if (i == last) return;
    uint64_t bits = ones.from(i);
    for (; i + L::kCount <= last; i += L::kCount) {
      step<L::kCount>(i, bits, zero, one);
      if (!kPlanes) zero += L::kCount, one += L::kCount;
      bits >>= L::kCount;
    }
    for (; i < last; ++i, bits >>= 1) {
      y[i] = bits & 1 ? *one : *zero;
      if (!kPlanes) ++zero, ++one;
    }
  }
};

void look_up(const LookUpArguments& call, Range range) {
  with_float(call.dtype, [&](auto number) {
    with_bool(call.channels.inner != 1, [&](auto planes) {
      using Number = decltype(number);
      using Bits = typename Number::Bits;
      const LookUp<Number, planes.value> body{{call.ones, bytes_for(call.n)},
                                              static_cast<const Bits*>(call.table),
                                              static_cast<Bits*>(call.y),
                                              call.channels.count};
      over_stretches(call.channels, 8 * range.first, std::min(8 * range.last, call.n), body);
    });
  });
}

// ---- gradients: eight elements as floats ----

template <class Number>
struct Eight;

template <>
struct Eight<Float32> {
  FASTSHAPE_AVX2_INLINE static __m256 load(const int32_t* x) { return _mm256_loadu_ps(reinterpret_cast<const float*>(x)); }
  FASTSHAPE_AVX2_INLINE static void store(int32_t* y, __m256 v) { _mm256_storeu_ps(reinterpret_cast<float*>(y), v); }
};

template <>
struct Eight<Float16> {
  FASTSHAPE_AVX2_INLINE static __m256 load(const int16_t* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  FASTSHAPE_AVX2_INLINE static void store(int16_t* y, __m256 v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

template <>
struct Eight<BFloat16> {
  FASTSHAPE_AVX2_INLINE static __m256 load(const int16_t* x) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  // Rounds to nearest, ties to even: adds half of a step less one, and one more where the upper half is odd.
  FASTSHAPE_AVX2_INLINE static void store(int16_t* y, __m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd), 16);
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), is_nan);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y),
                     _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1)));
  }
};

FASTSHAPE_AVX2_INLINE __m256 keep(uint64_t bits) { return _mm256_castsi256_ps(Lanes<Float32>::keep(bits)); }

// ---- sums ----

// Sums over zeros and over ones in eight lanes of floats. A lane takes at most 64 elements before it is added to a double.
struct SumPair {
  __m256 zeros, ones;

  FASTSHAPE_AVX2_INLINE void clear() { zeros = ones = _mm256_setzero_ps(); }
  FASTSHAPE_AVX2_INLINE void add(__m256 grad, uint64_t bits) {
    const __m256 one = keep(bits);
    zeros = _mm256_add_ps(zeros, _mm256_andnot_ps(one, grad));
    ones = _mm256_add_ps(ones, _mm256_and_ps(one, grad));
  }
};

FASTSHAPE_AVX2_INLINE double total(__m256 v) {
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
  const __m256d four = _mm256_add_pd(low, high);
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
}

FASTSHAPE_AVX2_INLINE void add_lanes(double* sum, __m256 v) {
  _mm256_storeu_pd(sum, _mm256_add_pd(_mm256_loadu_pd(sum), _mm256_cvtps_pd(_mm256_castps256_ps128(v))));
  _mm256_storeu_pd(sum + 4, _mm256_add_pd(_mm256_loadu_pd(sum + 4), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))));
}

template <class Number>
FASTSHAPE_AVX2 void sum_plane(const typename Number::Bits* grad, const BitReader& ones, int64_t i, int64_t last, double* sum0,
                              double* sum1) {
  while (i + 8 <= last) {
    SumPair pair[4];
    for (SumPair& p : pair) p.clear();
    const int64_t block_end = std::min(last, i + 64 * kStep);
    for (; i + kStep <= block_end; i += kStep) {
      const uint64_t bits = ones.from(i);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) pair[k].add(Eight<Number>::load(grad + i + 8 * k), bits >> (8 * k));
    }
    if (i < block_end) {
      uint64_t bits = ones.from(i);
      for (int k = 0; i + 8 <= block_end; ++k, i += 8, bits >>= 8) pair[k].add(Eight<Number>::load(grad + i), bits);
    }
#pragma GCC unroll 4
    for (const SumPair& p : pair) {
      *sum0 += total(p.zeros);
      *sum1 += total(p.ones);
    }
  }
  for (; i < last; ++i) *(ones.from(i) & 1 ? sum1 : sum0) += Value<Number>::load(grad[i]);
}

// Sums of kVectors * 8 channels over the rows [row, end), which are at most 64.
template <class Number, int kVectors>
FASTSHAPE_AVX2_INLINE void sum_columns(const typename Number::Bits* grad, const BitReader& ones, int64_t row, int64_t end, int64_t count,
                                       int64_t channel, double* zeros_sum, double* ones_sum) {
  SumPair pair[kVectors];
  for (SumPair& p : pair) p.clear();
  for (int64_t i = row * count + channel; row < end; ++row, i += count) {
    const uint64_t bits = ones.from(i);
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) pair[k].add(Eight<Number>::load(grad + i + 8 * k), bits >> (8 * k));
  }
#pragma GCC unroll 4
  for (int k = 0; k < kVectors; ++k) {
    add_lanes(zeros_sum + channel + 8 * k, pair[k].zeros);
    add_lanes(ones_sum + channel + 8 * k, pair[k].ones);
  }
}

template <class Number>
FASTSHAPE_AVX2 void sum_rows(const typename Number::Bits* grad, const BitReader& ones, int64_t row, int64_t end, int64_t count,
                             double* partial) {
  double *zeros_sum = partial, *ones_sum = partial + count;
  std::fill(partial, partial + 2 * count, 0.0);
  for (; row < end; row += 64) {
    const int64_t block_end = std::min(row + 64, end);
    int64_t c = 0;
    for (; c + 32 <= count; c += 32) sum_columns<Number, 4>(grad, ones, row, block_end, count, c, zeros_sum, ones_sum);
    for (; c + 8 <= count; c += 8) sum_columns<Number, 1>(grad, ones, row, block_end, count, c, zeros_sum, ones_sum);
    for (; c < count; ++c)
      for (int64_t r = row; r < block_end; ++r)
        (ones.from(r * count + c) & 1 ? ones_sum : zeros_sum)[c] += Value<Number>::load(grad[r * count + c]);
  }
}

template <class F>
void with_eight(Dtype dtype, const F& body) {
  if (dtype == Dtype::kFloat16) return body(Float16{});
  if (dtype == Dtype::kBFloat16) return body(BFloat16{});
  body(Float32{});
}

void sums(const Sums& call, Range range) {
  if (call.dtype == Dtype::kFloat64) return plain_batch_norm_kernels().sums(call, range);
  with_eight(call.dtype, [&](auto number) {
    using Number = decltype(number);
    const auto* grad = static_cast<const typename Number::Bits*>(call.grad);
    const BitReader ones{call.ones, bytes_for(call.n)};
    const int64_t count = call.channels.count, inner = call.channels.inner;
    if (inner == 1) {
      const int64_t rows = call.n / count, each = rows_a_unit(call.channels);
      for (int64_t unit = range.first; unit < range.last; ++unit)
        sum_rows<Number>(grad, ones, unit * each, std::min(rows, (unit + 1) * each), count, call.partials + 2 * count * unit);
      return;
    }
    double *zeros_sum = call.partials, *ones_sum = call.partials + count;
    std::fill(zeros_sum + range.first, zeros_sum + range.last, 0.0);
    std::fill(ones_sum + range.first, ones_sum + range.last, 0.0);
    // Images in the outer loop, channels in the inner one: the channels of a range are adjacent in memory.
    for (int64_t image = 0; image < call.n; image += count * inner)
      for (int64_t c = range.first; c < range.last; ++c)
        sum_plane<Number>(grad, ones, image + c * inner, image + (c + 1) * inner, zeros_sum + c, ones_sum + c);
  });
}

// ---- grad_input ----

template <class Number, bool kPlanes>
struct GradInput {
  using Bits = typename Number::Bits;
  const Bits* grad;
  Bits* dx;
  BitReader ones, mask;
  int64_t mask_first;  // the element that the mask's first bit belongs to
  const float* coefficients;
  int64_t count;

  FASTSHAPE_AVX2_INLINE static __m256 coefficient(const float* from, int k) {
    return kPlanes ? _mm256_set1_ps(*from) : _mm256_loadu_ps(from + k);
  }

  // Eight elements from i + k on; `c` points to the coefficients of the first element's channel.
  FASTSHAPE_AVX2_INLINE void eight(int64_t i, int k, uint64_t one_bits, uint64_t mask_bits, const float* c) const {
    const __m256 one = keep(one_bits >> k);
    const __m256 scale = _mm256_blendv_ps(coefficient(c, k), coefficient(c + count, k), one);
    const __m256 shift = _mm256_blendv_ps(coefficient(c + 2 * count, k), coefficient(c + 3 * count, k), one);
    __m256 value = _mm256_mul_ps(scale, Eight<Number>::load(grad + i + k));
    value = _mm256_and_ps(value, _mm256_cmp_ps(scale, _mm256_setzero_ps(), _CMP_NEQ_UQ));
    value = _mm256_add_ps(value, shift);
    Eight<Number>::store(dx + i + k, _mm256_and_ps(value, keep(mask_bits >> k)));
  }

  FASTSHAPE_AVX2 void operator()(int64_t i, int64_t last, int64_t channel) const {
    const float* c = coefficients + channel;
    for (; i + kStep <= last; i += kStep) {
      const uint64_t one_bits = ones.from(i), mask_bits = mask.from(i - mask_first);
#pragma GCC unroll 4
      for (int k = 0; k < kStep; k += 8) eight(i, k, one_bits, mask_bits, c);
      if (!kPlanes) c += kStep;
    }
    if (i == last) return;
    uint64_t one_bits = ones.from(i), mask_bits = mask.from(i - mask_first);
    for (; i + 8 <= last; i += 8, one_bits >>= 8, mask_bits >>= 8) {
      eight(i, 0, one_bits, mask_bits, c);
      if (!kPlanes) c += 8;
    }
    for (; i < last; ++i, one_bits >>= 1, mask_bits >>= 1) {
      const float* own = c + (one_bits & 1 ? count : 0);
      const float value = grad_element(Value<Number>::load(grad[i]), own[0], own[2 * count]);
      dx[i] = mask_bits & 1 ? Value<Number>::round(value) : Bits{0};
      if (!kPlanes) ++c;
    }
  }
};

void grad_input(const GradInputArguments& call, const Mask& mask, Range range) {
  if (call.dtype == Dtype::kFloat64) return plain_batch_norm_kernels().grad_input(call, mask, range);
  MaskStrip strip;
  for (int64_t byte = range.first; byte < range.last; byte += MaskStrip::kBytes) {
    const Range piece{byte, std::min(byte + MaskStrip::kBytes, range.last)};
    const BitReader keep = strip.read(mask, call.n, piece);
    with_eight(call.dtype, [&](auto number) {
      with_bool(call.channels.inner != 1, [&](auto planes) {
        using Number = decltype(number);
        using Bits = typename Number::Bits;
        const GradInput<Number, planes.value> body{static_cast<const Bits*>(call.grad),
                                                   static_cast<Bits*>(call.dx),
                                                   {call.ones, bytes_for(call.n)},
                                                   keep,
                                                   8 * piece.first,
                                                   static_cast<const float*>(call.coefficients),
                                                   call.channels.count};
        over_stretches(call.channels, 8 * piece.first, std::min(8 * piece.last, call.n), body);
      });
    });
  }
}

}  // namespace

const BatchNormKernels* avx2_batch_norm_kernels() {
  static const BatchNormKernels kernels = {count, look_up, sums, grad_input};
  return has_avx2() ? &kernels : nullptr;
}

}  // namespace fastshape::cpu

#else

namespace fastshape::cpu {
const BatchNormKernels* avx2_batch_norm_kernels() { return nullptr; }
}  // namespace fastshape::cpu

#endif
