// How a SIMD path serves a call: it does the whole steps, and the plain path does the rest.
#pragma once

#include "dispatch.h"
#include "kernels.h"

namespace fastshape::cpu {

// Prefetches the memory of a step that is 2 KiB ahead of the one at `x`. Drawing a mask delays the loads for longer than the
// hardware prefetcher looks ahead. The address may be after the tensor's end, because a prefetch reads nothing.
template <int64_t kElements, class Bits>
FASTSHAPE_INLINE void look_ahead(const Bits* x) {
  constexpr uintptr_t kAhead = 2048, kLine = 64;
  const uintptr_t first = reinterpret_cast<uintptr_t>(x) + kAhead;
  for (uintptr_t at = 0; at < kElements * sizeof(Bits); at += kLine) __builtin_prefetch(reinterpret_cast<const void*>(first + at));
}

// `Path` has kStepBytes, the mask bytes of a step, and kernels for ranges of whole steps. The ranges of `pack` are whole blocks
// of 64 elements.
template <class Path>
struct Driver {
  static int64_t end_of_steps(int64_t n, Range range, int64_t step_bytes) {
    const int64_t full_bytes = n / 8 < range.last ? n / 8 : range.last;
    return full_bytes <= range.first ? range.first : range.first + (full_bytes - range.first) / step_bytes * step_bytes;
  }

  // The threshold 65536 keeps nothing and does not fit a 16-bit comparison. It is rare, so the plain path serves it.
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

  static void pack_top(const TopArguments& call, Range range) {
    with_float(call.dtype, [&](auto number) { Path::template pack_top<decltype(number)>(call, range); });
  }

  static Kernels kernels(const char* simd) { return {simd, shape, ones, pack, pack_random, pack_top, plain_kernels().unpack}; }
};

}  // namespace fastshape::cpu
