// How a SIMD path serves a call: whole steps itself, what is left by the plain path.
#pragma once

#include "dispatch.h"
#include "kernels.h"

namespace fastshape::cpu {

// Asks for the memory of a step that is 2 KiB ahead of the one at `x`. Drawing a mask keeps a core from its loads for longer
// than the hardware looks ahead. It may lie behind the tensor's end: a hint reads nothing.
template <int64_t kElements, class Bits>
FASTSHAPE_INLINE void look_ahead(const Bits* x) {
  constexpr uintptr_t kAhead = 2048, kLine = 64;
  const uintptr_t first = reinterpret_cast<uintptr_t>(x) + kAhead;
  for (uintptr_t at = 0; at < kElements * sizeof(Bits); at += kLine) __builtin_prefetch(reinterpret_cast<const void*>(first + at));
}

// `Path` has kStepBytes, the mask bytes of a step, and the kernels of ranges that whole steps fill; those of `pack` are
// filled by blocks of 64 elements.
template <class Path>
struct Driver {
  static int64_t end_of_steps(int64_t n, Range range, int64_t step_bytes) {
    const int64_t full_bytes = n / 8 < range.last ? n / 8 : range.last;
    return full_bytes <= range.first ? range.first : range.first + (full_bytes - range.first) / step_bytes * step_bytes;
  }

  // 65536 does not fit a 16-bit comparison. It keeps nothing, and nobody asks for it: the plain path serves.
  static bool takes_plain_path(const Mask& mask) { return mask.source == MaskSource::kRandom && mask.threshold > 0xFFFF; }

  static void shape(const ShapeArguments& call, const Mask& mask, Range range) {
    if (takes_plain_path(mask)) return plain_kernels().shape(call, mask, range);
    const int64_t middle = end_of_steps(call.n, range, Path::kStepBytes);
    with_shape(call, mask, [&](auto number, auto binarize, auto within_one, auto source) {
      Path::template shape<decltype(number), binarize.value, within_one.value, source.value>(call, mask, {range.first, middle});
    });
    plain_kernels().shape(call, mask, {middle, range.last});
  }

  static void ones(const OnesArguments& call, const Mask& mask, Range range) {
    if (takes_plain_path(mask)) return plain_kernels().ones(call, mask, range);
    const int64_t middle = end_of_steps(call.n, range, Path::kStepBytes);
    with_ones(call, mask, [&](auto number, auto within_one, auto source) {
      Path::template ones<decltype(number), within_one.value, source.value>(call, mask, {range.first, middle});
    });
    plain_kernels().ones(call, mask, {middle, range.last});
  }

  static void pack(Dtype dtype, const void* x, uint8_t* bits, int64_t n, Range range) {
    const int64_t middle = end_of_steps(n, range, 8);
    with_number(dtype, [&](auto number) {
      using Number = decltype(number);
      Path::template pack<Number>(static_cast<const typename Number::Bits*>(x), bits, {range.first, middle});
    });
    plain_kernels().pack(dtype, x, bits, n, {middle, range.last});
  }

  static void pack_random(const Mask& mask, uint8_t* bits, int64_t n, Range range) {
    if (takes_plain_path(mask)) return plain_kernels().pack_random(mask, bits, n, range);
    const int64_t middle = end_of_steps(n, range, Path::kStepBytes);
    with_source(mask.source, [&](auto source) { Path::template pack_random<source.value>(mask, bits, {range.first, middle}); });
    plain_kernels().pack_random(mask, bits, n, {middle, range.last});
  }

  static Kernels kernels(const char* simd) { return {simd, shape, ones, pack, pack_random, plain_kernels().unpack}; }
};

}  // namespace fastshape::cpu
