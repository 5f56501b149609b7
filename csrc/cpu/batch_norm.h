// CPU kernels of shape + BatchNorm + ReLU, on raw pointers. They start from the bits of the binary map. Kernels that write a
// map work on a range of its mask bytes, and kernels that sum work on a range of `units`. The result does not depend on how
// the ranges are divided.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "fastshape/arguments.h"
#include "kernels.h"

namespace fastshape::cpu {

// Reads the bits of a map from any element on.
struct BitReader {
  const uint8_t* bits;
  int64_t bytes;

  // At least 57 bits; the lowest is the bit of `element`. Bits after the last byte are zero.
  FASTSHAPE_INLINE uint64_t from(int64_t element) const {
    const int64_t byte = element / 8;
    uint64_t word = 0;
    if (byte + 8 <= bytes)
      std::memcpy(&word, bits + byte, 8);
    else
      std::memcpy(&word, bits + byte, static_cast<size_t>(bytes - byte));
    return word >> (element % 8);
  }
};

// Divides the elements [first, last) into stretches and calls body(first, last, channel) for each. In a contiguous map a
// stretch is a part of one plane and has one channel. In a channels_last map it is a part of one pixel: its elements belong to
// the channels `channel`, `channel` + 1 and so on.
template <class F>
FASTSHAPE_INLINE void over_stretches(const Channels& channels, int64_t first, int64_t last, const F& body) {
  const int64_t inner = channels.inner, count = channels.count;
  const int64_t length = inner == 1 ? count : inner;
  int64_t index = first / length, end = (index + 1) * length;
  int64_t channel = inner == 1 ? first % count : index % count;
  while (first < last) {
    body(first, std::min(end, last), channel);
    first = end;
    end += length;
    channel = inner == 1 || channel + 1 == count ? 0 : channel + 1;
  }
}

// ---- sums: which elements are added, and in which order, depends on the map's shape alone ----

// A unit of a channels_last map is rows_a_unit() rows of `count` channels. A unit of a contiguous map is a channel.
inline int64_t rows_a_unit(const Channels& channels) {
  constexpr int64_t kElements = 32768, kRows = 64;
  return std::max(kElements / channels.count / kRows, int64_t{1}) * kRows;
}
inline int64_t sum_units(int64_t n, const Channels& channels) {
  if (channels.inner != 1) return channels.count;
  const int64_t rows = n / channels.count, each = rows_a_unit(channels);
  return (rows + each - 1) / each;
}
// The number of partial sum pairs per channel: one for each unit of rows. A channel of a contiguous map has one.
inline int64_t sum_partials(int64_t n, const Channels& channels) {
  return channels.inner != 1 ? 1 : std::max(sum_units(n, channels), int64_t{1});
}

struct Sums {
  Dtype dtype;
  const void* grad;
  const uint8_t* ones;
  int64_t n;
  Channels channels;
  double* partials;  // (partials, 2, channels)
};

struct BatchNormKernels {
  // Ones of channels [range.first, range.last).
  void (*count)(const uint8_t* ones, int64_t n, const Channels&, int64_t* counts, Range);
  void (*look_up)(const LookUpArguments&, Range);  // bytes
  void (*sums)(const Sums&, Range);                // units
  void (*grad_input)(const GradInputArguments&, const Mask&, Range);  // bytes
};

const BatchNormKernels& plain_batch_norm_kernels();
const BatchNormKernels* avx2_batch_norm_kernels();
const BatchNormKernels& batch_norm_kernels();  // the kernels in use

// The mask bits of a stretch of a map: given bits are read in place, random bits are drawn into a buffer.
class MaskStrip {
 public:
  static constexpr int64_t kBytes = 4096;

  // `range` has at most kBytes.
  BitReader read(const Mask& mask, int64_t n, Range range) {
    const int64_t bytes = range.last - range.first;
    if (mask.source == MaskSource::kBits) return {mask.bits + range.first, bytes};
    if (mask.source == MaskSource::kNone) {
      std::memset(buffer_, 0xFF, static_cast<size_t>(bytes));
    } else {
      Mask shifted = mask;
      shifted.offset += static_cast<uint64_t>(range.first);
      kernels().pack_random(shifted, buffer_, n - 8 * range.first, {0, bytes});
    }
    return {buffer_, bytes};
  }

 private:
  uint8_t buffer_[kBytes];
};

}  // namespace fastshape::cpu
