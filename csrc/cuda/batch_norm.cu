// Where the bytes go, per element of s bytes: `ones` (kernels.cu) reads s and writes 1/8, `look_up` reads 1/8 and writes
// s; `sums` reads s and 1/8, `grad_input` reads s and 1/8 and writes s. The bits of a map (3 MB at 25 million elements)
// stay in the L2 cache from one kernel to the next, so that `count` costs no memory traffic, and what the channels have
// costs none either. Everything here is laid out for the maps to be read and written 16 bytes at a time.
#include "batch_norm.cuh"

#include <algorithm>
#include <numeric>

#include "channels.cuh"
#include "map.cuh"

namespace fastshape::cuda {
namespace {

// ---- what is the same on both sides ----

int64_t rounded_up(int64_t a, int64_t b) { return divided_up(a, b) * b; }

// A map of planes, cut in chunks of which a plane has one or more: a chunk is what a group of lanes works on.
struct PlaneChunks {
  int64_t inner, planes;
  int64_t elements;          // of a chunk; the last of a plane may have fewer
  Divisor chunks, channels;  // chunks: of a plane

  PlaneChunks(int64_t n, Channels c, int64_t most)
      : inner(c.inner),
        planes(n / c.inner),
        elements(rounded_up(divided_up(c.inner, divided_up(c.inner, most)), 8)),
        chunks(divided_up(c.inner, elements)),
        channels(c.count) {}

  FASTSHAPE_FUNCTION int64_t units() const { return planes * chunks(); }
};

// Calls f(number among the chunks of its channel, channel, first element, length) for each chunk. All lanes of a warp come
// equally often, some with a chunk that does not exist: element 0, length 0.
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

// A group of 8 lanes is enough for a small plane: 128 bytes an access, four planes a warp.
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

constexpr int64_t kCountedBits = 8192;  // a chunk

template <int kGroup>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    count_planes_kernel(const uint8_t* ones, const PlaneChunks chunks, unsigned long long* counts) {
  over_chunks<kGroup>(chunks, [&](int64_t, int64_t channel, int64_t first, int length) {
    const uint8_t* from = ones + static_cast<uint64_t>(first) / 8;
    const int lead = static_cast<int>(static_cast<uint64_t>(first) % 8), end = lead + length;  // bits behind *from
    uint32_t found = 0;
#pragma unroll 4
    for (int byte = lane_index() % kGroup; 8 * byte < end; byte += kGroup) {
      uint32_t bits = from[byte];
      if (byte == 0) bits &= 0xFFu << lead;
      if (end - 8 * byte < 8) bits &= (1u << (end - 8 * byte)) - 1u;
      found += __popc(bits);
    }
    found = sum_of_group<kGroup>(found);
    if (lane_index() % kGroup == 0) atomicAdd(counts + channel, found);
  });
}

// Channels_last, met as rows of `width` bits: a pixel, or as many whole pixels as fit into 32 bits. So a place in the row
// has one channel, and a warp owns 32 places over many rows.
struct CountedRows {
  static constexpr int64_t kRows = 512;  // a warp
  int64_t width, rows, groups;

  CountedRows(int64_t n, int64_t channels) {
    width = channels < kLanes ? kLanes / channels * channels : channels;
    rows = divided_up(n, width);
    groups = divided_up(width, kLanes);
  }
  FASTSHAPE_FUNCTION int64_t units() const { return groups * ((rows + kRows - 1) / kRows); }
};

// The bits from number `first` on; 0 behind the end.
__device__ __forceinline__ uint32_t bits_from(const uint8_t* ones, uint64_t first, uint64_t bytes) {
  const int shift = static_cast<int>(first % 8);
  uint64_t bits = 0;
#pragma unroll
  for (int k = 0; k < 5; ++k)
    if ((k < 4 || shift > 0) && first / 8 + k < bytes) bits |= static_cast<uint64_t>(ones[first / 8 + k]) << (8 * k);
  return static_cast<uint32_t>(bits >> shift);
}

// 32 words of 32 bits, a lane each: bit i of lane k becomes bit k of lane i.
__device__ __forceinline__ uint32_t transposed(uint32_t word, unsigned lane) {
#pragma unroll
  for (unsigned size = kLanes / 2; size > 0; size /= 2) {
    const uint32_t low = kAllLanes / ((1u << size) + 1u);  // places whose number has no `size` in it
    const uint32_t other = __shfl_xor_sync(kAllLanes, word, size);
    word = lane & size ? (word & ~low) | (other >> size & low) : (word & low) | (other & low) << size;
  }
  return word;
}

__global__ void __launch_bounds__(kThreads, kMinBlocks)
    count_rows_kernel(const uint8_t* ones, int64_t n, const CountedRows rows, int64_t channels, bool words,
                      unsigned long long* counts) {
  const unsigned lane = lane_index();
  for (int64_t unit = warp_index(); unit < rows.units(); unit += warp_count()) {
    const int64_t start = unit / rows.groups * rows.kRows, place = unit % rows.groups * kLanes;
    const int64_t stop = min(start + rows.kRows, rows.rows);
    uint32_t found = 0;
#pragma unroll 4
    for (int64_t row = start; row < stop; row += kLanes) {
      const uint64_t first = (row + lane) * rows.width + place;
      uint32_t word = 0;
      if (row + lane < stop)
        word = words ? reinterpret_cast<const uint32_t*>(ones)[first / 32] : bits_from(ones, first, bytes_for(n));
      found += __popc(transposed(word, lane));
    }
    if (place + lane < rows.width) atomicAdd(counts + (place + lane) % channels, found);
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

// An op that looks up what the channels have.
template <class Bits, MaskSource kSource>
struct ChannelOp : Op<Bits, kSource> {
  using Place = cuda::Place;
  static constexpr int kPlainLoads = 2;  // many more instructions an element than elsewhere, for what is seldom met
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
    Bits chosen[kCount];
    Chooser<kPattern, kCount>(this->map, place, bits >> 8).choose(table, chosen);
#pragma unroll
    for (int k = 0; k < kCount; ++k) element[k] = chosen[k];
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

// A vector where it cannot be had as one: behind a pointer that is not aligned, or with no more than `left` elements to the
// end of the map, and zeros after them.
template <class Bits>
__device__ __forceinline__ void load_elements(const Bits* x, int64_t left, Bits (&element)[kVectorWidth<Bits>]) {
#pragma unroll
  for (int k = 0; k < kVectorWidth<Bits>; ++k) element[k] = k < left ? x[k] : Bits{0};
}

// Where the bits of a vector are, which begins in a byte or at a whole part of one.
__device__ __forceinline__ uint32_t byte_of(const uint8_t* ones, uint64_t first) { return ones[first / 8]; }
template <int kWidth>
__device__ __forceinline__ uint32_t bits_in(uint32_t byte, uint64_t first) {
  return kWidth == 8 ? byte : byte >> (first % 8);
}

constexpr int64_t kSummedElements = 4096;  // a chunk of a plane

// A group of lanes has the vectors that a chunk touches, dealt in turn: vectors are counted from the beginning of the map,
// so that all are aligned, and those at the edges of the chunk are met by its neighbour too. Each lane adds kLoadsInFlight
// vectors in the accumulator, and these sums in float64.
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
        Accumulator few[2] = {0, 0};  // of zeros, of ones
        const auto add = [&](int vector, const Bits* element, uint32_t byte) {
          const int before = lead - vector * kWidth, behind = (vector + 1) * kWidth - lead - length;
          const uint32_t valid = (kAll << max(before, 0)) & (kAll >> max(behind, 0));
          const uint32_t bits = bits_in<kWidth>(byte, base + vector * kWidth), zeros = valid & ~bits, others = valid & bits;
#pragma unroll
          for (int k = 0; k < kWidth; ++k) {
            const Accumulator value = Value<Number>::load(element[k]);
            if (zeros >> k & 1) few[0] += value;
            if (others >> k & 1) few[1] += value;
          }
        };
        if (whole) {
          V loaded[kLoadsInFlight];
          uint32_t byte[kLoadsInFlight];
#pragma unroll
          for (int i = 0; i < kLoadsInFlight; ++i) {
            const int vector = min(first + i * kGroup, last);
            loaded[i] = reinterpret_cast<const V*>(x)[vector];
            byte[i] = byte_of(ones, base + vector * kWidth);
          }
#pragma unroll
          for (int i = 0; i < kLoadsInFlight; ++i)
            if (first + i * kGroup <= last) add(first + i * kGroup, Elements<Bits>(loaded[i]).element, byte[i]);
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

// Channels_last, met as rows of `width` elements: whole pixels that are whole vectors too, and as many as fit into a warp's
// 64 elements. So a place in the row has one channel, and a vector's places are the same in every row. A part is some rows;
// pixels that share a row are parts of their own.
struct SummedRows {
  static constexpr int kColumns = 8, kSubrows = kLanes / kColumns;  // of vectors: how a warp lies
  static constexpr int64_t kStep = kLoadsInFlight * kSubrows;       // rows
  static constexpr int64_t kFew = 64 * kSubrows;                    // rows that are added in the accumulator
  // Enough warps for every multiprocessor to have many loads in flight, and not many more: each leaves sums behind.
  static constexpr int64_t kWarpsWanted = 2048;
  int64_t width, rows, rows_per_part, parts, slots;

  SummedRows(int64_t n, int64_t channels) {
    width = std::lcm(channels, int64_t{8});
    width *= std::max<int64_t>(1, 64 / width);
    slots = width / channels;
    rows = divided_up(n, width);
    rows_per_part = std::max(2 * kStep, rounded_up(divided_up(rows * divided_up(width, 64), kWarpsWanted), kStep));
    parts = divided_up(rows, rows_per_part);
  }
};

// A warp has 8 columns of vectors, each 128 bytes of 4 rows an access, and walks down the rows of its part. Each lane keeps
// the sums of its vector's channels; after kFew rows the four lanes of a column add theirs up in float64, each for a quarter
// of the channels' sums: so few fit into registers.
template <class Number>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    sum_rows_kernel(const void* grad, const uint8_t* ones, int64_t n, const SummedRows rows, int64_t channels, bool aligned,
                    double* sums) {
  using Bits = typename Number::Bits;
  using V = Vector<Bits>;
  using Accumulator = typename Value<Number>::Accumulator;
  constexpr int kWidth = kVectorWidth<Bits>, kOwned = kWidth / 2;
  constexpr unsigned kOfZerosOrOnes = SummedRows::kColumns, kOfHalf = 2 * SummedRows::kColumns;  // what a lane's number says
  const unsigned lane = lane_index();
  const int64_t groups = (rows.width / kWidth + SummedRows::kColumns - 1) / SummedRows::kColumns;
  const int64_t whole_rows = aligned ? n / rows.width : 0, access = SummedRows::kSubrows * rows.width;
  for (int64_t unit = warp_index(); unit < rows.parts * groups; unit += warp_count()) {
    const int64_t part = unit / groups, column = unit % groups * SummedRows::kColumns + lane % SummedRows::kColumns;
    const bool exists = column * kWidth < rows.width;
    const int64_t place = exists ? column * kWidth : 0;  // a lane without a column may load, but does not tell
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
      const int64_t stop = min(row + SummedRows::kFew, end);
#pragma unroll 1
      for (; row < stop; row += SummedRows::kStep) {
        const uint64_t first = (row + lane / SummedRows::kColumns) * rows.width + place;
        const Bits* x = static_cast<const Bits*>(grad) + first;
        if (row + SummedRows::kStep <= whole_rows) {
          V loaded[kLoadsInFlight];
          uint32_t byte[kLoadsInFlight];
#pragma unroll
          for (int i = 0; i < kLoadsInFlight; ++i) {
            loaded[i] = *reinterpret_cast<const V*>(x + i * access);
            byte[i] = byte_of(ones, first + i * access);
          }
#pragma unroll
          for (int i = 0; i < kLoadsInFlight; ++i)
            add(Elements<Bits>(loaded[i]).element, bits_in<kWidth>(byte[i], first + i * access));
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
        const bool one = lane & kOfZerosOrOnes;
        const Accumulator mine = one ? few[1][k] : few[0][k], others = one ? few[0][k] : few[1][k];
        half[k] = static_cast<double>(mine) + static_cast<double>(__shfl_xor_sync(kAllLanes, others, kOfZerosOrOnes));
      }
#pragma unroll
      for (int k = 0; k < kOwned; ++k) {
        const bool second = lane & kOfHalf;
        const double mine = second ? half[kOwned + k] : half[k], others = second ? half[k] : half[kOwned + k];
        owned[k] += mine + __shfl_xor_sync(kAllLanes, others, kOfHalf);
      }
    }
#pragma unroll
    for (int k = 0; k < kOwned; ++k) {
      const int64_t at = place + (lane & kOfHalf ? kOwned + k : k), slot = at / channels, channel = at % channels;
      if (exists) sums[((part * rows.slots + slot) * 2 + (lane & kOfZerosOrOnes ? 1 : 0)) * channels + channel] = owned[k];
    }
  }
}

// ---- differentiate ----

// A warp a channel, and a block a warp, so that the multiprocessors share what there is to read: a lane adds every 32nd
// part, and the lanes add theirs.
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
    double of_weight, of_bias;
    const Coefficients<Accumulator> found =
        differentiate_channel<Number>(norm, statistics, sum, elements, c, channels, &of_weight, &of_bias);
    if (grad_weight) store_number(norm.parameter_dtype, grad_weight, c, of_weight);
    if (grad_bias) store_number(norm.parameter_dtype, grad_bias, c, of_bias);
    auto* to = static_cast<Accumulator*>(coefficients);
#pragma unroll
    for (int a = 0; a < 2; ++a) {
      to[a * channels + c] = found.scale[a];
      to[(2 + a) * channels + c] = found.shift[a];
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

// float64 does with the last pattern alone: moving eight bytes an element, it has the time for it.
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
    const CountedRows rows(n, channels.count);
    const bool words = rows.width % 32 == 0 && n % 32 == 0 && is_aligned(ones, 4);
    return launch(count_rows_kernel, kThreads, rows.units(), kWarps, stream, ones, n, rows, channels.count, words, to);
  }
  const PlaneChunks chunks(n, channels, kCountedBits);
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
  const auto look_up = [&](auto bits) {  // patterns are moved, not read
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
    const SummedRows rows(n, channels.count);
    return rows.parts * rows.slots;
  }
  const PlaneChunks chunks(n, channels, kSummedElements);
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
      const SummedRows rows(n, channels.count);
      const int64_t groups = divided_up(rows.width, kVectorWidth<typename Number::Bits> * SummedRows::kColumns);
      error = launch(sum_rows_kernel<Number>, kThreads, rows.parts * groups, kWarps, stream, grad, ones, n, rows,
                     channels.count, aligned, sums);
      return;
    }
    const PlaneChunks chunks(n, channels, kSummedElements);
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
