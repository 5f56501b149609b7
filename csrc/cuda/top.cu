// The bits of the largest elements of each row. A warp does a group of rows, row by row, so that it owns whole bytes. It finds
// the last key that is kept eight bits at a time, each time from a histogram of these bits of the keys that agree in the bits
// found before. Where many keys are equal, their additions to one bin wait for each other.
#include <type_traits>

#include "fastshape/order.h"
#include "kernels.cuh"
#include "launch.cuh"

namespace fastshape::cuda {
namespace {

constexpr unsigned kDigitBits = 8;
constexpr unsigned kBins = 1u << kDigitBits;
constexpr unsigned kBinsOfLane = kBins / kLanes;

// What the lanes of a warp share.
template <class Key>
struct Workspace {
  unsigned bins[kBins];
  unsigned digit, above, in_bin;  // the bin of the last kept key, the number of keys in bins above it, and its own
  Cut<Key> cuts[8];               // of the rows of a group; `ties` is where in the row they end
};

// The unsigned integer of the order of `order_key`.
template <class Number>
__device__ __forceinline__ std::make_unsigned_t<typename Number::Bits> unsigned_key(typename Number::Bits x) {
  using Unsigned = std::make_unsigned_t<typename Number::Bits>;
  constexpr auto kSign = static_cast<Unsigned>(Unsigned{1} << (8 * sizeof(Unsigned) - 1));
  return static_cast<Unsigned>(static_cast<Unsigned>(order_key<Number>(x)) ^ kSign);
}

// Finds the bin of the `needed`-th key from above. Lane l has the bins from number 8 l on.
template <class Key>
__device__ __forceinline__ void find_bin(Workspace<Key>& space, unsigned needed, unsigned lane) {
  unsigned sum = 0;
#pragma unroll
  for (unsigned k = 0; k < kBinsOfLane; ++k) sum += space.bins[kBinsOfLane * lane + k];
  unsigned above = sum;  // then also the sums of the lanes above
#pragma unroll
  for (unsigned step = 1; step < kLanes; step *= 2) {
    const unsigned other = __shfl_sync(kAllLanes, above, static_cast<int>((lane + step) % kLanes), kLanes);
    if (lane + step < kLanes) above += other;
  }
  above -= sum;
  if (above < needed && needed - above <= sum) {
    unsigned bin = kBinsOfLane * lane + kBinsOfLane - 1;
    for (; needed - above > space.bins[bin]; --bin) above += space.bins[bin];
    space.digit = bin, space.above = above, space.in_bin = space.bins[bin];
  }
  __syncwarp();
}

// All lanes return the same.
template <class Number>
__device__ Cut<typename Number::Bits> cut_of(const typename Number::Bits* x, int64_t row, int64_t count,
                                             Workspace<typename Number::Bits>& space, unsigned lane) {
  using Key = typename Number::Bits;
  using Unsigned = std::make_unsigned_t<Key>;
  constexpr int kBits = 8 * sizeof(Key);
  if (count == row) return {static_cast<Key>(kLowestKey<Number> - 1), 0};
  if (count == 0) return {kHighestKey<Number>, 0};
  Unsigned prefix = 0;  // the bits found so far
  auto needed = static_cast<unsigned>(count);
  for (int shift = kBits - kDigitBits; shift >= 0; shift -= kDigitBits) {
    for (unsigned bin = lane; bin < kBins; bin += kLanes) space.bins[bin] = 0;
    __syncwarp();
    // Two shifts, because one by all bits of a number is not defined.
    const auto known = static_cast<Unsigned>(prefix >> shift >> (kDigitBits - 1) >> 1);
#pragma unroll 4
    for (int64_t i = lane; i < row; i += kLanes) {
      const auto digits = static_cast<Unsigned>(unsigned_key<Number>(x[i]) >> shift);
      if (static_cast<Unsigned>(digits >> (kDigitBits - 1) >> 1) == known)
        atomicAdd(&space.bins[static_cast<unsigned>(digits) % kBins], 1u);
    }
    __syncwarp();
    find_bin(space, needed, lane);
    prefix = static_cast<Unsigned>(prefix | static_cast<Unsigned>(space.digit) << shift);
    needed -= space.above;
    const bool whole_bin = needed == space.in_bin;
    __syncwarp();
    if (whole_bin) {
      --prefix, needed = 0;
      break;
    }
  }
  constexpr auto kSign = static_cast<Unsigned>(Unsigned{1} << (kBits - 1));
  return {static_cast<Key>(static_cast<Unsigned>(prefix ^ kSign)), needed};
}

// Where in the row the part ends in which elements equal to the cut are kept.
template <class Number>
__device__ int64_t end_of_ties(const typename Number::Bits* x, int64_t row, Cut<typename Number::Bits> cut, unsigned lane) {
  if (cut.ties == 0) return 0;
  for (int64_t first = 0;; first += kLanes) {
    const int64_t i = first + lane;
    unsigned equal = __ballot_sync(kAllLanes, i < row && order_key<Number>(x[i]) == cut.key);
    const int here = __popc(equal);
    if (here < cut.ties) {
      cut.ties -= here;
      continue;
    }
    for (; cut.ties > 1; --cut.ties) equal &= equal - 1;
    return first + __popc(equal ^ (equal - 1));  // the lowest bit and those below it
  }
}

template <class Number>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    pack_top_kernel(const void* map, uint8_t* bits, int64_t n, int64_t row, int64_t count) {
  using Key = typename Number::Bits;
  __shared__ Workspace<Key> spaces[kWarps];
  Workspace<Key>& space = spaces[threadIdx.x / kLanes];
  const unsigned lane = lane_index();
  const int64_t group = rows_in_group(row) * row;  // elements
  for (int64_t first = warp_index() * group; first < n; first += warp_count() * group) {
    const Key* x = static_cast<const Key*>(map) + first;
    const int64_t size = n - first < group ? n - first : group;
    for (int64_t start = 0, r = 0; start < size; start += row, ++r) {
      const Cut<Key> cut = cut_of<Number>(x + start, row, count, space, lane);
      const int64_t end = end_of_ties<Number>(x + start, row, cut, lane);
      if (lane == 0) space.cuts[r] = {cut.key, end};
    }
    __syncwarp();
    for (int64_t byte = lane; byte < bytes_for(size); byte += kLanes) {
      int64_t r = group == row ? 0 : 8 * byte / row, at = 8 * byte - r * row;
      unsigned packed = 0;
      for (unsigned k = 0; k < 8 && 8 * byte + k < size; ++k) {
        const Key key = order_key<Number>(x[8 * byte + k]), last = space.cuts[r].key;
        packed |= static_cast<unsigned>(key > last || (key == last && at < space.cuts[r].ties)) << k;
        if (++at == row) at = 0, ++r;
      }
      bits[first / 8 + byte] = static_cast<uint8_t>(packed);
    }
    __syncwarp();
  }
}

}  // namespace

cudaError_t pack_top(const TopArguments& call, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  with_float(call.dtype, [&](auto number) {
    const int64_t groups = divided_up(call.n, rows_in_group(call.row) * call.row);
    error = launch(pack_top_kernel<decltype(number)>, kThreads, groups, kWarps, stream, call.x, call.bits, call.n, call.row,
                   call.count);
  });
  return error;
}

}  // namespace fastshape::cuda
