// Memory traffic in bytes per element, for elements of s bytes: `ones` (kernels.cu) reads s and writes 1/8, `look_up` reads 1/8
// and writes s, `sums` reads s and 1/8, `grad_input` reads s and 1/8 and writes s. The bits of a map (3 MB for 25 million
// elements) stay in the L2 cache from one kernel to the next, so `count` causes no memory traffic. Neither do the tables of the
// channels. All kernels are designed to read and write maps 16 bytes at a time.
#include "batch_norm.cuh"

#include <algorithm>
#include <numeric>

#include "channels.cuh"
#include "map.cuh"

namespace fastshape::cuda {
namespace {

// ---- shared by forward and backward ----

int64_t rounded_up(int64_t a, int64_t b) { return divided_up(a, b) * b; }

// A contiguous map, divided into chunks. A plane has one or more chunks, and a group of lanes works on one chunk at a time.
struct PlaneChunks {
  int64_t inner, planes;
  int64_t elements;          // per chunk; the last chunk of a plane may have fewer
  Divisor chunks, channels;  // chunks per plane, channels of the map

  PlaneChunks(int64_t n, Channels c, int64_t most)
      : inner(c.inner),
        planes(n / c.inner),
        elements(rounded_up(divided_up(c.inner, divided_up(c.inner, most)), 8)),
        chunks(divided_up(c.inner, elements)),
        channels(c.count) {}

  FASTSHAPE_FUNCTION int64_t units() const { return planes * chunks(); }
};

// Calls f(index of the chunk in its channel, channel, first element, length) for each chunk. All lanes of a warp make the same
// number of calls. A lane without a chunk of its own gets element 0 and length 0.
template <int kGroup, class F>
__device__ __forceinline__ void over_chunks(const PlaneChunks& c, const F& f) {
  constexpr int kGroups = kLanes / kGroup;
  for (int64_t warp = warp_index(); warp * kGroups < c.units(); warp += warp_count()) {
    const int64_t unit = warp * kGroups + lane_index() / kGroup;
    const int64_t plane = c.chunks.divide(unit), chunk = unit - plane * c.chunks();
    const int64_t image = c.channels.divide(plane), start = chunk * c.elements;
    const bool exists = unit < c.units();
    f(image * c.chunks() + chunk, plane - image * c.channels(), exists ? plane * c.inner + start : 0,
      exists ? static_cast<int>(min(c.elements, c.inner - start)) : 0);
  }
}

// A group of 8 lanes is enough for a small plane: 128 bytes per access, four planes per warp.
constexpr int64_t kSmallPlane = 1024;

template <class F>
void with_group(const PlaneChunks& chunks, F&& f) {
  using std::integral_constant;
  chunks.elements <= kSmallPlane ? f(integral_constant<int, 8>{}) : f(integral_constant<int, 32>{});
}

template <int kGroup, class T>
__device__ __forceinline__ T sum_of_group(T value) {
#pragma unroll
  for (int distance = kGroup / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// ---- count ----

constexpr int64_t kCountChunk = 8192;  // bits per chunk

template <int kGroup>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    count_planes_kernel(const uint8_t* ones, const PlaneChunks chunks, unsigned long long* counts) {
  over_chunks<kGroup>(chunks, [&](int64_t, int64_t channel, int64_t first, int length) {
    const uint8_t* from = ones + static_cast<uint64_t>(first) / 8;
    const int lead = static_cast<int>(static_cast<uint64_t>(first) % 8), end = lead + length;  // bits from *from on
    uint32_t total = 0;
#pragma unroll 4
    for (int byte = lane_index() % kGroup; 8 * byte < end; byte += kGroup) {
      uint32_t bits = from[byte];
      if (byte == 0) bits &= 0xFFu << lead;
      if (end - 8 * byte < 8) bits &= (1u << (end - 8 * byte)) - 1u;
      total += __popc(bits);
    }
    total = sum_of_group<kGroup>(total);
    if (lane_index() % kGroup == 0) atomicAdd(counts + channel, total);
  });
}

// A channels_last map as rows of `width` bits: one pixel, or as many whole pixels as fit into 32 bits. So each position in a
// row belongs to one channel, and a warp counts 32 positions over many rows.
struct CountRows {
  static constexpr int64_t kRows = 512;  // per warp
  int64_t width, rows, groups;

  CountRows(int64_t n, int64_t channels) {
    width = channels < kLanes ? kLanes / channels * channels : channels;
    rows = divided_up(n, width);
    groups = divided_up(width, kLanes);
  }
  FASTSHAPE_FUNCTION int64_t units() const { return groups * ((rows + kRows - 1) / kRows); }
};

// The 32 bits from number `first` on. Bits after the end of the map are 0.
__device__ __forceinline__ uint32_t bits_from(const uint8_t* ones, uint64_t first, uint64_t bytes) {
  const int shift = static_cast<int>(first % 8);
  uint64_t bits = 0;
#pragma unroll
  for (int k = 0; k < 5; ++k)
    if ((k < 4 || shift > 0) && first / 8 + k < bytes) bits |= static_cast<uint64_t>(ones[first / 8 + k]) << (8 * k);
  return static_cast<uint32_t>(bits >> shift);
}

// Transposes 32 words of 32 bits, one word per lane: bit i of lane k becomes bit k of lane i.
__device__ __forceinline__ uint32_t transpose(uint32_t word, unsigned lane) {
#pragma unroll
  for (unsigned size = kLanes / 2; size > 0; size /= 2) {
    const uint32_t low = kAllLanes / ((1u << size) + 1u);  // the positions whose number has no bit `size`
    const uint32_t other = __shfl_xor_sync(kAllLanes, word, size);
    word = lane & size ? (word & ~low) | (other >> size & low) : (word & low) | (other & low) << size;
  }
  return word;
}

__global__ void __launch_bounds__(kThreads, kMinBlocks)
    count_rows_kernel(const uint8_t* ones, int64_t n, const CountRows rows, int64_t channels, bool words,
                      unsigned long long* counts) {
  const unsigned lane = lane_index();
  for (int64_t unit = warp_index(); unit < rows.units(); unit += warp_count()) {
    const int64_t start = unit / rows.groups * rows.kRows, position = unit % rows.groups * kLanes;
    const int64_t stop = min(start + rows.kRows, rows.rows);
    uint32_t total = 0;
#pragma unroll 4
    for (int64_t row = start; row < stop; row += kLanes) {
      const uint64_t first = (row + lane) * rows.width + position;
      uint32_t word = 0;
      if (row + lane < stop)
        word = words ? reinterpret_cast<const uint32_t*>(ones)[first / 32] : bits_from(ones, first, bytes_for(n));
      total += __popc(transpose(word, lane));
    }
    if (position + lane < rows.width) atomicAdd(counts + (position + lane) % channels, total);
  }
}

// ---- normalize ----

template <class Number>
__global__ void __launch_bounds__(kLanes)
    normalize_kernel(const BatchNorm norm, const int64_t* counts, int64_t elements, int64_t channels, double* statistics,
                     void* table) {
  for (int64_t c = blockIdx.x * int64_t{kLanes} + threadIdx.x; c < channels; c += gridDim.x * int64_t{kLanes})
    normalize_channel<Number>(norm, norm.batch_statistics ? counts[c] : 0, elements, c, channels, statistics,
                              static_cast<typename Number::Bits*>(table));
}

// An op that looks up a value of each element's channel.
template <class Bits, MaskSource kSource>
struct ChannelOp : Op<Bits, kSource> {
  using Place = cuda::Place;
  static constexpr int kPlainLoads = 2;  // few, because this path is rare and needs many instructions per element
  static constexpr bool kOnes = true;

  ChannelMap map;

  __device__ Place place(int64_t element) const { return map.place(element); }
  template <int kWidth>
  __device__ void advance(Place& place) const {
    map.template advance<kWidth>(place);
  }
};

// ---- look up ----

template <class BitsOfOne, Pattern kPattern>
struct LookUpOp : ChannelOp<BitsOfOne, MaskSource::kNone> {
  using Bits = BitsOfOne;
  static constexpr bool kReads = false;

  const Bits* table;

  template <int kCount>
  __device__ uint32_t apply(Bits* element, const Place& place, uint32_t bits) const {
    Bits value[kCount];
    Chooser<kPattern, kCount>(this->map, place, bits >> 8).choose(table, value);
#pragma unroll
    for (int k = 0; k < kCount; ++k) element[k] = value[k];
    return 0;
  }
};

template <class Bits, Pattern kPattern>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    look_up_kernel(const uint8_t* ones, const void* table, void* y, const ChannelMap map, const Work work) {
  using ThisOp = LookUpOp<Bits, kPattern>;
  over_map(ThisOp{{{nullptr, y, ones, nullptr, nullptr}, map}, static_cast<const Bits*>(table)}, {}, work);
}

// ---- sums ----

// Loads a vector element by element, because the pointer is not aligned or the map ends after `left` elements. Elements after
// the end are zero.
template <class Bits>
__device__ __forceinline__ void load_elements(const Bits* x, int64_t left, Bits (&element)[kVectorWidth<Bits>]) {
#pragma unroll
  for (int k = 0; k < kVectorWidth<Bits>; ++k) element[k] = k < left ? x[k] : Bits{0};
}

// The byte with the bits of a vector, and the vector's bits in it. A vector never crosses a byte.
__device__ __forceinline__ uint32_t byte_of(const uint8_t* ones, uint64_t first) { return ones[first / 8]; }
template <int kWidth>
__device__ __forceinline__ uint32_t bits_in(uint32_t byte, uint64_t first) {
  return kWidth == 8 ? byte : byte >> (first % 8);
}

constexpr int64_t kSumChunk = 4096;  // elements per chunk of a plane

// The lanes of a group take turns with the vectors that overlap a chunk. Vectors are counted from the beginning of the map, so
// that all are aligned; a vector at the edge of a chunk is also read for the neighbouring chunk. Each lane adds up
// kLoadsInFlight vectors in the accumulator, and adds the results in float64.
template <class Number, int kGroup>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    sum_planes_kernel(const void* grad, const uint8_t* ones, int64_t n, const PlaneChunks chunks, bool aligned,
                      double* sums) {
  using Bits = typename Number::Bits;
  using V = Vector<Bits>;
  using Accumulator = typename Value<Number>::Accumulator;
  constexpr int kWidth = kVectorWidth<Bits>;
  constexpr uint32_t kAll = (1u << kWidth) - 1u;
  over_chunks<kGroup>(chunks, [&](int64_t part, int64_t channel, int64_t start, int length) {
    const int lead = static_cast<int>(static_cast<uint64_t>(start) % kWidth), last = (lead + length - 1) / kWidth;
    const uint64_t base = start - lead;
    const Bits* x = static_cast<const Bits*>(grad) + base;
    const bool whole = aligned && static_cast<int64_t>(base) + (last + 1) * kWidth <= n;
    double total[2] = {0, 0};
    if (length > 0) {
#pragma unroll 1
      for (int first = lane_index() % kGroup; first <= last; first += kLoadsInFlight * kGroup) {
        Accumulator few[2] = {0, 0};  // sums over zeros and over ones
        const auto add = [&](int vector, const Bits* element, uint32_t byte) {
          const int before = lead - vector * kWidth, after = (vector + 1) * kWidth - lead - length;
          const uint32_t valid = (kAll << max(before, 0)) & (kAll >> max(after, 0));
          const uint32_t bits = bits_in<kWidth>(byte, base + vector * kWidth), zeros = valid & ~bits, others = valid & bits;
#pragma unroll
          for (int k = 0; k < kWidth; ++k) {
            const Accumulator value = Value<Number>::load(element[k]);
            if (zeros >> k & 1) few[0] += value;
            if (others >> k & 1) few[1] += value;
          }
        };
        if (whole) {
          V vectors[kLoadsInFlight];
          uint32_t byte[kLoadsInFlight];
#pragma unroll
          for (int i = 0; i < kLoadsInFlight; ++i) {
            const int vector = min(first + i * kGroup, last);
            vectors[i] = reinterpret_cast<const V*>(x)[vector];
            byte[i] = byte_of(ones, base + vector * kWidth);
          }
#pragma unroll
          for (int i = 0; i < kLoadsInFlight; ++i)
            if (first + i * kGroup <= last) add(first + i * kGroup, Elements<Bits>(vectors[i]).element, byte[i]);
        } else {
#pragma unroll 1
          for (int i = 0; i < kLoadsInFlight; ++i) {
            const int vector = first + i * kGroup;
            if (vector > last) break;
            Bits element[kWidth];
            load_elements(x + vector * kWidth, n - static_cast<int64_t>(base) - vector * kWidth, element);
            add(vector, element, byte_of(ones, base + vector * kWidth));
          }
        }
        total[0] += few[0];
        total[1] += few[1];
      }
    }
#pragma unroll
    for (int a = 0; a < 2; ++a) {
      total[a] = sum_of_group<kGroup>(total[a]);
      if (lane_index() % kGroup == 0 && length > 0) sums[(part * 2 + a) * chunks.channels() + channel] = total[a];
    }
  });
}

// A channels_last map as rows of `width` elements. A row is a whole number of pixels and of vectors, as many as fit into the 64
// elements of a warp. So each position in a row belongs to one channel, and a vector has the same channels in every row. A part
// is a number of rows. Each pixel of a row (`slots` in all) has its own partial sums.
struct SumRows {
  static constexpr int kColumns = 8, kSubrows = kLanes / kColumns;  // vectors: the shape of a warp
  static constexpr int64_t kStep = kLoadsInFlight * kSubrows;       // rows
  static constexpr int64_t kFew = 64 * kSubrows;                    // rows that are added up in the accumulator
  // Enough warps for many loads in flight on every multiprocessor, but few, because each writes partial sums.
  static constexpr int64_t kTargetWarps = 2048;
  int64_t width, rows, rows_per_part, parts, slots;

  SumRows(int64_t n, int64_t channels) {
    width = std::lcm(channels, int64_t{8});
    width *= std::max<int64_t>(1, 64 / width);
    slots = width / channels;
    rows = divided_up(n, width);
    rows_per_part = std::max(2 * kStep, rounded_up(divided_up(rows * divided_up(width, 64), kTargetWarps), kStep));
    parts = divided_up(rows, rows_per_part);
  }
};

// A warp has 8 columns of vectors, so that an access reads 128 bytes in each of 4 rows. It goes down the rows of its part, and
// each lane keeps the sums of its vector's channels. After kFew rows the four lanes of a column add their sums up in float64.
// Each of the four keeps a quarter of the results, because a lane has no registers for more.
template <class Number>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    sum_rows_kernel(const void* grad, const uint8_t* ones, int64_t n, const SumRows rows, int64_t channels, bool aligned,
                    double* sums) {
  using Bits = typename Number::Bits;
  using V = Vector<Bits>;
  using Accumulator = typename Value<Number>::Accumulator;
  constexpr int kWidth = kVectorWidth<Bits>, kOwned = kWidth / 2;
  // Bits of a lane's number: whether it keeps the sums over zeros or over ones, and for which half of the vector.
  constexpr unsigned kOnesBit = SumRows::kColumns, kHalfBit = 2 * SumRows::kColumns;
  const unsigned lane = lane_index();
  const int64_t groups = (rows.width / kWidth + SumRows::kColumns - 1) / SumRows::kColumns;
  const int64_t whole_rows = aligned ? n / rows.width : 0, access = SumRows::kSubrows * rows.width;
  for (int64_t unit = warp_index(); unit < rows.parts * groups; unit += warp_count()) {
    const int64_t part = unit / groups, column = unit % groups * SumRows::kColumns + lane % SumRows::kColumns;
    const bool exists = column * kWidth < rows.width;
    const int64_t place = exists ? column * kWidth : 0;  // a lane without a column loads but does not store
    const int64_t end = min((part + 1) * rows.rows_per_part, rows.rows);
    double owned[kOwned] = {};
#pragma unroll 1
    for (int64_t row = part * rows.rows_per_part; row < end;) {
      Accumulator few[2][kWidth] = {};
      const auto add = [&](const Bits* element, uint32_t bits) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          const Accumulator value = Value<Number>::load(element[k]);
          if (bits >> k & 1) {
            few[1][k] += value;
          } else {
            few[0][k] += value;
          }
        }
      };
      const int64_t stop = min(row + SumRows::kFew, end);
#pragma unroll 1
      for (; row < stop; row += SumRows::kStep) {
        const uint64_t first = (row + lane / SumRows::kColumns) * rows.width + place;
        const Bits* x = static_cast<const Bits*>(grad) + first;
        if (row + SumRows::kStep <= whole_rows) {
          V vectors[kLoadsInFlight];
          uint32_t byte[kLoadsInFlight];
#pragma unroll
          for (int i = 0; i < kLoadsInFlight; ++i) {
            vectors[i] = *reinterpret_cast<const V*>(x + i * access);
            byte[i] = byte_of(ones, first + i * access);
          }
#pragma unroll
          for (int i = 0; i < kLoadsInFlight; ++i)
            add(Elements<Bits>(vectors[i]).element, bits_in<kWidth>(byte[i], first + i * access));
        } else {
#pragma unroll 1
          for (int i = 0; i < kLoadsInFlight; ++i) {
            const int64_t left = n - static_cast<int64_t>(first) - i * access;
            if (left <= 0) break;
            Bits element[kWidth];
            load_elements(x + i * access, left, element);
            add(element, bits_in<kWidth>(byte_of(ones, first + i * access), first + i * access));
          }
        }
      }
      double half[kWidth];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const bool one = lane & kOnesBit;
        const Accumulator mine = one ? few[1][k] : few[0][k], others = one ? few[0][k] : few[1][k];
        half[k] = static_cast<double>(mine) + static_cast<double>(__shfl_xor_sync(kAllLanes, others, kOnesBit));
      }
#pragma unroll
      for (int k = 0; k < kOwned; ++k) {
        const bool second = lane & kHalfBit;
        const double mine = second ? half[kOwned + k] : half[k], others = second ? half[k] : half[kOwned + k];
        owned[k] += mine + __shfl_xor_sync(kAllLanes, others, kHalfBit);
      }
    }
#pragma unroll
    for (int k = 0; k < kOwned; ++k) {
      const int64_t at = place + (lane & kHalfBit ? kOwned + k : k), slot = at / channels, channel = at % channels;
      if (exists) sums[((part * rows.slots + slot) * 2 + (lane & kOnesBit ? 1 : 0)) * channels + channel] = owned[k];
    }
  }
}

// ---- differentiate ----

// One warp per channel and one warp per block, so that the work is spread over the multiprocessors. Each lane adds up every 32nd
// part; then the lanes add up their sums.
template <class Number>
__global__ void __launch_bounds__(kLanes)
    differentiate_kernel(const BatchNorm norm, const double* statistics, const double* sums, int64_t partials,
                         int64_t elements, int64_t channels, void* grad_weight, void* grad_bias, void* coefficients) {
  using Accumulator = typename Value<Number>::Accumulator;
  for (int64_t c = blockIdx.x; c < channels; c += gridDim.x) {
    double sum[2] = {0, 0};
#pragma unroll 4
    for (int64_t part = lane_index(); part < partials; part += kLanes)
#pragma unroll
      for (int a = 0; a < 2; ++a) sum[a] += sums[(part * 2 + a) * channels + c];
    for (double& s : sum) s = sum_of_group<kLanes>(s);
    if (lane_index() != 0) continue;
    double weight, bias;  // their gradients
    const Coefficients<Accumulator> result =
        differentiate_channel<Number>(norm, statistics, sum, elements, c, channels, &weight, &bias);
    if (grad_weight) store_number(norm.parameter_dtype, grad_weight, c, weight);
    if (grad_bias) store_number(norm.parameter_dtype, grad_bias, c, bias);
    auto* to = static_cast<Accumulator*>(coefficients);
#pragma unroll
    for (int a = 0; a < 2; ++a) {
      to[a * channels + c] = result.scale[a];
      to[(2 + a) * channels + c] = result.shift[a];
    }
  }
}

// ---- the gradient of the input ----

template <class Number, MaskSource kMaskSource, Pattern kPattern>
struct GradInputOp : ChannelOp<typename Number::Bits, kMaskSource> {
  using Bits = typename Number::Bits;
  using Accumulator = typename Value<Number>::Accumulator;
  static constexpr int kLoads = 2;

  const Accumulator* coefficients;

  template <int kCount>
  __device__ uint32_t apply(Bits* element, const Place& place, uint32_t bits) const {
    const Chooser<kPattern, kCount> chooser(this->map, place, bits >> 8);
    Accumulator scale[kCount], shift[kCount];
    chooser.choose(coefficients, scale);
    chooser.choose(coefficients + 2 * int64_t{this->map.count()}, shift);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const Accumulator dx = grad_element(Value<Number>::load(element[k]), scale[k], shift[k]);
      element[k] = Value<Number>::round(bits >> k & 1 ? dx : Accumulator{0});
    }
    return 0;
  }
};

template <class Number, MaskSource kSource, Pattern kPattern>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    grad_input_kernel(const void* grad, const uint8_t* ones, const MaskRequest mask, const void* coefficients, void* dx,
                      const ChannelMap map, const Work work) {
  using ThisOp = GradInputOp<Number, kSource, kPattern>;
  const auto* numbers = static_cast<const typename ThisOp::Accumulator*>(coefficients);
  over_map(ThisOp{{{grad, dx, ones, nullptr, nullptr}, map}, numbers}, mask, work);
}

// float64 always uses the pattern kAny: it moves eight bytes per element, so that memory and not arithmetic is the limit.
template <int kWidth, class F>
void with_pattern(Channels channels, const void* rows, F&& f) {
  using std::integral_constant;
  if constexpr (kWidth > 2) {
    if (channels.inner % kWidth == 0) return f(integral_constant<Pattern, Pattern::kPlanes>{});
    if (channels.inner == 1 && channels.count % kWidth == 0 && is_aligned(rows, 16))
      return f(integral_constant<Pattern, Pattern::kRows>{});
  }
  f(integral_constant<Pattern, Pattern::kAny>{});
}

}  // namespace

// ---- launches ----

cudaError_t count(const uint8_t* ones, int64_t n, Channels channels, int64_t* counts, cudaStream_t stream) {
  if (channels.count == 0) return cudaSuccess;
  if (cudaError_t error = cudaMemsetAsync(counts, 0, channels.count * sizeof(int64_t), stream)) return error;
  if (n == 0) return cudaSuccess;
  auto* to = reinterpret_cast<unsigned long long*>(counts);
  if (channels.inner == 1) {
    const CountRows rows(n, channels.count);
    const bool words = rows.width % 32 == 0 && n % 32 == 0 && is_aligned(ones, 4);
    return launch(count_rows_kernel, kThreads, rows.units(), kWarps, stream, ones, n, rows, channels.count, words, to);
  }
  const PlaneChunks chunks(n, channels, kCountChunk);
  cudaError_t error = cudaErrorInvalidValue;
  with_group(chunks, [&](auto group) {
    error = launch(count_planes_kernel<group.value>, kThreads, chunks.units(), kThreads / group.value, stream, ones, chunks,
                   to);
  });
  return error;
}

cudaError_t normalize(const BatchNorm& norm, Dtype dtype, const int64_t* counts, int64_t n, Channels channels,
                      double* statistics, void* table, cudaStream_t stream) {
  if (channels.count == 0) return cudaSuccess;
  cudaError_t error = cudaErrorInvalidValue;
  with_float(dtype, [&](auto number) {
    error = launch(normalize_kernel<decltype(number)>, kLanes, channels.count, kLanes, stream, norm, counts,
                   n / channels.count, channels.count, statistics, table);
  });
  return error;
}

cudaError_t look_up(const LookUpArguments& call, cudaStream_t stream) {
  if (call.n == 0) return cudaSuccess;
  if (call.channels.count > kMostChannels) return cudaErrorInvalidValue;
  cudaError_t error = cudaErrorInvalidValue;
  const auto look_up = [&](auto bits) {  // one kernel per width: bit patterns are copied, not interpreted
    using Bits = decltype(bits);
    constexpr int kWidth = kVectorWidth<Bits>;
    with_pattern<kWidth>(call.channels, call.table, [&](auto pattern) {
      const Work work = work_for<LookUpOp<Bits, pattern.value>>(call.n, is_aligned(call.y, 16));
      error = launch(look_up_kernel<Bits, pattern.value>, kThreads, work.units(), kWarps, stream, call.ones, call.table,
                     call.y, ChannelMap(call.channels, kWidth), work);
    });
  };
  with_float(call.dtype, [&](auto number) { look_up(typename decltype(number)::Bits{}); });
  return error;
}

int64_t partials(int64_t n, Channels channels) {
  if (n == 0) return 0;
  if (channels.inner == 1) {
    const SumRows rows(n, channels.count);
    return rows.parts * rows.slots;
  }
  const PlaneChunks chunks(n, channels, kSumChunk);
  return chunks.units() / channels.count;
}

cudaError_t sums(Dtype dtype, const void* grad, const uint8_t* ones, int64_t n, Channels channels, double* sums,
                 cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  cudaError_t error = cudaErrorInvalidValue;
  const bool aligned = is_aligned(grad, 16);
  with_float(dtype, [&](auto number) {
    using Number = decltype(number);
    if (channels.inner == 1) {
      const SumRows rows(n, channels.count);
      const int64_t groups = divided_up(rows.width, kVectorWidth<typename Number::Bits> * SumRows::kColumns);
      error = launch(sum_rows_kernel<Number>, kThreads, rows.parts * groups, kWarps, stream, grad, ones, n, rows,
                     channels.count, aligned, sums);
      return;
    }
    const PlaneChunks chunks(n, channels, kSumChunk);
    with_group(chunks, [&](auto group) {
      error = launch(sum_planes_kernel<Number, group.value>, kThreads, chunks.units(), kThreads / group.value, stream, grad,
                     ones, n, chunks, aligned, sums);
    });
  });
  return error;
}

cudaError_t differentiate(const BatchNorm& norm, Dtype dtype, const double* statistics, const double* sums,
                          int64_t partials, int64_t n, Channels channels, void* grad_weight, void* grad_bias,
                          void* coefficients, cudaStream_t stream) {
  if (channels.count == 0) return cudaSuccess;
  cudaError_t error = cudaErrorInvalidValue;
  with_float(dtype, [&](auto number) {
    error = launch(differentiate_kernel<decltype(number)>, kLanes, channels.count, 1, stream, norm, statistics, sums,
                   partials, n / channels.count, channels.count, grad_weight, grad_bias, coefficients);
  });
  return error;
}

cudaError_t grad_input(const GradInputArguments& call, cudaStream_t stream) {
  if (call.n == 0) return cudaSuccess;
  if (call.channels.count > kMostChannels) return cudaErrorInvalidValue;
  cudaError_t error = cudaErrorInvalidValue;
  with_float(call.dtype, [&](auto number) {
    with_source(call.mask.source, [&](auto source) {
      using Number = decltype(number);
      constexpr int kWidth = kVectorWidth<typename Number::Bits>;
      with_pattern<kWidth>(call.channels, call.coefficients, [&](auto pattern) {
        using ThisOp = GradInputOp<Number, source.value, pattern.value>;
        const Work work = work_for<ThisOp>(call.n, is_aligned(call.grad, 16) && is_aligned(call.dx, 16));
        error = launch(grad_input_kernel<Number, source.value, pattern.value>, kThreads, work.units(), kWarps, stream,
                       call.grad, call.ones, call.mask, call.coefficients, call.dx, ChannelMap(call.channels, kWidth), work);
      });
    });
  });
  return error;
}

}  // namespace fastshape::cuda
