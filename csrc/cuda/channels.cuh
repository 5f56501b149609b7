// Finds an element's channel and looks up its value in a table of two numbers per channel.
#pragma once

#include <cstdint>
#include <cstring>

#include "fastshape/batch_norm.h"
#include "tile.cuh"

namespace fastshape::cuda {

// Divides numbers below 2^63 by a number that is known when the kernel is launched. A product and a shift take a third of the
// instructions of a division. (Granlund and Montgomery, "Division by invariant integers using multiplication", PLDI 1994. Let
// 2^s be the first power of two that is not below the divisor d, and m the first integer above 2^(63 + s) / d, which fits 64
// bits. Then x / d is the integer part of x m / 2^(63 + s).)
class Divisor {
 public:
  explicit Divisor(int64_t divisor) : divisor_(divisor) {
    while (shift_ < 63 && int64_t{1} << shift_ < divisor) ++shift_;
    // d = 1 would need a shift by -1 in `divide`, which returns x itself instead.
    if (divisor > 1) multiplier_ = static_cast<uint64_t>((static_cast<unsigned __int128>(1) << (63 + shift_)) / divisor + 1);
  }

  __device__ __forceinline__ int64_t divide(int64_t x) const {
    return divisor_ == 1 ? x : static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(x), multiplier_) >> (shift_ - 1));
  }
  FASTSHAPE_FUNCTION int64_t operator()() const { return divisor_; }

 private:
  int64_t divisor_;
  uint64_t multiplier_ = 0;
  int shift_ = 0;
};

// With more channels, an index into a table of two numbers per channel would not fit 32 bits.
constexpr int64_t kMostChannels = 0x7FFFFFFF;

// An element's channel, and its position in the plane.
struct Place {
  uint32_t channel;
  int64_t position;
};

// The places of the elements of one lane, access by access. Only the first access of a step needs a division.
class ChannelMap {
 public:
  // `width`: elements per vector.
  ChannelMap(Channels channels, int width)
      : inner_(channels.inner), count_(channels.count), vector_(channels, kLanes * width), element_(channels, kLanes) {}

  __device__ __forceinline__ int64_t inner() const { return inner_(); }
  __device__ __forceinline__ uint32_t count() const { return static_cast<uint32_t>(count_()); }

  __device__ __forceinline__ Place place(int64_t element) const {
    const int64_t plane = inner_.divide(element);
    return {static_cast<uint32_t>(plane - count_.divide(plane) * count_()), element - plane * inner()};
  }

  // Moves on to the next access, of single elements or of vectors.
  template <int kWidth>
  __device__ __forceinline__ void advance(Place& place) const {
    const Step& step = kWidth == 1 ? element_ : vector_;
    place.position += step.position;
    const bool over = place.position >= inner();
    if (over) place.position -= inner();
    place.channel = wrapped(place.channel + step.channel + over);
  }

  // For channels below twice the count.
  __device__ __forceinline__ uint32_t wrapped(uint32_t channel) const { return min(channel, channel - count()); }

 private:
  struct Step {
    uint32_t channel;
    int64_t position;

    Step(Channels channels, int64_t elements)
        : channel(static_cast<uint32_t>(elements / channels.inner % channels.count)), position(elements % channels.inner) {}
  };

  Divisor inner_, count_;
  Step vector_, element_;
};

// The channels of the elements of one access of a lane.
enum class Pattern {
  kPlanes,  // all elements have the same channel
  kRows,    // consecutive channels; the first is a multiple of the vector's width
  kAny,     // any channels
};

// Looks up kCount consecutive elements, the first at `place`, in tables of two numbers per channel: the numbers for zeros, then
// the numbers for ones. Bit k of `ones` is the value of element k. A table has a few kilobytes and every warp reads it, so that
// it stays in the L1 cache.
template <Pattern kPattern, int kCount>
struct Chooser {
  static constexpr bool kOneByOne = kPattern == Pattern::kAny || kCount == 1;

  uint32_t count, ones, channel;
  uint32_t index[kOneByOne ? kCount : 1];  // in a table

  __device__ __forceinline__ Chooser(const ChannelMap& map, const Place& place, uint32_t ones)
      : count(map.count()), ones(ones), channel(place.channel) {
    if constexpr (kOneByOne) {
      // Elements left in this plane, and the size of the next planes. Both are capped, because at most kCount matter.
      int left = static_cast<int>(min(map.inner() - place.position, int64_t{kCount}));
      const int inner = static_cast<int>(min(map.inner(), int64_t{kCount}));
      uint32_t at = channel;
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        index[k] = at + (ones >> k & 1 ? count : 0u);
        const bool last = k + 1 >= left;
        at = last ? map.wrapped(at + 1) : at;
        left += last ? inner : 0;
      }
    }
  }

  template <class T>
  __device__ __forceinline__ void choose(const T* table, T (&value)[kCount]) const {
    if constexpr (kOneByOne) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) value[k] = __ldg(table + index[k]);
    } else if constexpr (kPattern == Pattern::kPlanes) {
      const T zero = __ldg(table + channel), one = __ldg(table + (channel + count));
#pragma unroll
      for (int k = 0; k < kCount; ++k) value[k] = ones >> k & 1 ? one : zero;
    } else {
      constexpr int kPerLoad = 16 / sizeof(T);
#pragma unroll
      for (int k = 0; k < kCount; k += kPerLoad) {
        const uint4 zeros = __ldg(reinterpret_cast<const uint4*>(table + channel) + k / kPerLoad);
        const uint4 others = __ldg(reinterpret_cast<const uint4*>(table + (channel + count)) + k / kPerLoad);
        T zero[kPerLoad], one[kPerLoad];
        memcpy(zero, &zeros, 16);
        memcpy(one, &others, 16);
#pragma unroll
        for (int i = 0; i < kPerLoad; ++i) value[k + i] = ones >> (k + i) & 1 ? one[i] : zero[i];
      }
    }
  }
};

}  // namespace fastshape::cuda
