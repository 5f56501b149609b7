// The kernels that every processor can run. They also serve the elements that do not fill a vector.
#include "dispatch.h"
#include "top.h"

namespace fastshape::cpu {
namespace {

int64_t elements_in_byte(int64_t n, int64_t byte) {
  const int64_t left = n - 8 * byte;
  return left < 8 ? left : 8;
}

template <class Number, bool kBinarize, bool kWithinOne, MaskSource kSource>
void shape_bytes(const ShapeArguments& call, const Mask& mask, Range range) {
  using Bits = typename Number::Bits;
  const Bits* x = static_cast<const Bits*>(call.x);
  Bits* y = static_cast<Bits*>(call.y);
  for (int64_t byte = range.first; byte < range.last; ++byte) {
    const uint8_t keeps = mask_byte<kSource>(mask, byte);
    const int64_t count = elements_in_byte(call.n, byte);
    uint32_t within_one = 0;
    for (int64_t k = 0; k < count; ++k) {
      const bool keep = (keeps >> k) & 1;
      const Bits value = x[8 * byte + k];
      if (kWithinOne) within_one |= static_cast<uint32_t>(keep && is_within_one<Number>(value)) << k;
      y[8 * byte + k] = shape_element<Number, kBinarize>(value, keep);
    }
    if (kWithinOne) call.within_one[byte] = static_cast<uint8_t>(within_one);
  }
}

void shape(const ShapeArguments& call, const Mask& mask, Range range) {
  with_shape(call, mask, [&](auto number, auto binarize, auto within_one, auto source) {
    shape_bytes<decltype(number), binarize.value, within_one.value, source.value>(call, mask, range);
  });
}

template <class Number, bool kWithinOne, MaskSource kSource>
void ones_bytes(const OnesArguments& call, const Mask& mask, Range range) {
  const auto* x = static_cast<const typename Number::Bits*>(call.x);
  for (int64_t byte = range.first; byte < range.last; ++byte) {
    const uint32_t keep = mask_byte<kSource>(mask, byte);
    const int64_t count = elements_in_byte(call.n, byte);
    uint32_t ones = 0, within_one = 0;
    for (int64_t k = 0; k < count; ++k) {
      const auto value = x[8 * byte + k];
      ones |= static_cast<uint32_t>(is_positive<Number>(value)) << k;
      if (kWithinOne) within_one |= static_cast<uint32_t>(is_within_one<Number>(value)) << k;
    }
    call.ones[byte] = static_cast<uint8_t>(ones & keep);
    if (kWithinOne) call.within_one[byte] = static_cast<uint8_t>(within_one & keep);
  }
}

void ones(const OnesArguments& call, const Mask& mask, Range range) {
  with_ones(call, mask, [&](auto number, auto within_one, auto source) {
    ones_bytes<decltype(number), within_one.value, source.value>(call, mask, range);
  });
}

void pack(Dtype dtype, const void* x, uint8_t* bits, int64_t n, Range range) {
  with_number(dtype, [&](auto number) {
    using Number = decltype(number);
    const auto* values = static_cast<const typename Number::Bits*>(x);
    for (int64_t byte = range.first; byte < range.last; ++byte) {
      const int64_t count = elements_in_byte(n, byte);
      uint32_t packed = 0;
      for (int64_t k = 0; k < count; ++k) packed |= static_cast<uint32_t>(is_positive<Number>(values[8 * byte + k])) << k;
      bits[byte] = static_cast<uint8_t>(packed);
    }
  });
}

void pack_random(const Mask& mask, uint8_t* bits, int64_t n, Range range) {
  with_source(mask.source, [&](auto source) {
    for (int64_t byte = range.first; byte < range.last; ++byte)
      bits[byte] = mask_byte<source.value>(mask, byte) & tail_bits(n - 8 * byte);
  });
}

void pack_top(const TopArguments& call, Range range) {
  with_float(call.dtype, [&](auto number) { pack_top_of<decltype(number)>(call, range); });
}

void unpack(const uint8_t* bits, uint8_t* out, int64_t n, Range range) {
  for (int64_t byte = range.first; byte < range.last; ++byte) {
    const int64_t count = elements_in_byte(n, byte);
    for (int64_t k = 0; k < count; ++k) out[8 * byte + k] = (bits[byte] >> k) & 1;
  }
}

}  // namespace

const Kernels& plain_kernels() {
  static const Kernels kernels = {"plain", shape, ones, pack, pack_random, pack_top, unpack};
  return kernels;
}

}  // namespace fastshape::cpu
