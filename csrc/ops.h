// The elementwise ops of fastshape/_ops.py as torch calls them: the part that all devices share. The glue of each device adds
// how memory is allocated and how a kernel is run. This file uses the stable ABI of LibTorch alone, so that one binary serves
// every torch from 2.10 on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "fastshape/arguments.h"
#include "fastshape/dispatch.h"
#include "fastshape/mask.h"

namespace fastshape {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- checks ----

// True if the elements fill one stretch of memory without gap or overlap, in any order.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (const size_t d : order) {
    if (sizes[d] == 1) continue;
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

inline Dtype dtype_of(const Tensor& t, bool may_be_bytes = false) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::Bool:
    case ScalarType::Byte:
      if (may_be_bytes) return Dtype::kByte;
      [[fallthrough]];
    default: STD_TORCH_CHECK(false, "x: this dtype cannot be shaped; float16, bfloat16, float32 and float64 can");
  }
  return Dtype::kByte;
}

// ---- ops ----

// A `Backend` has kKey, its dispatch key; owns(tensor), whether its kernels can reach the tensor's memory; new_output(x), an
// uninitialized tensor like x; and the kernels. Its constructor takes a tensor and selects that tensor's device.
template <class Backend>
struct Ops {
  static void check_x(const Tensor& x) {
    STD_TORCH_CHECK(Backend::owns(x), "x must be a ", Backend::kKey, " tensor");
    STD_TORCH_CHECK(is_dense(x), "x must be dense in memory (contiguous or channels_last)");
  }

  // `device`: the device of the tensor that the bits mask.
  static const uint8_t* checked_bits(const Tensor& bits, int64_t n, int32_t device) {
    STD_TORCH_CHECK(Backend::owns(bits) && bits.get_device_index() == device && bits.scalar_type() == ScalarType::Byte &&
                        bits.is_contiguous() && bits.numel() == bytes_for(n),
                    "bits must be a contiguous uint8 ", Backend::kKey, " tensor of ", bytes_for(n), " bytes for ", n,
                    " elements, on the device of x");
    return static_cast<const uint8_t*>(bits.const_data_ptr());
  }

  static MaskRequest random_mask(const Tensor& rng_state, double p_zero, int32_t device) {
    STD_TORCH_CHECK(Backend::owns(rng_state) && rng_state.get_device_index() == device &&
                        rng_state.scalar_type() == ScalarType::Long && rng_state.is_contiguous() &&
                        rng_state.numel() == 2,
                    "rng_state must be a contiguous int64 ", Backend::kKey,
                    " tensor [seed, offset], on the device of x");
    STD_TORCH_CHECK(p_zero >= 0 && p_zero < 1, "p_zero must be in [0, 1), not ", p_zero);
    return MaskRequest::random(static_cast<const int64_t*>(rng_state.const_data_ptr()), p_zero);
  }

  static MaskRequest mask_of(const Tensor& x, const std::optional<Tensor>& rng_state, const std::optional<Tensor>& bits,
                             double p_zero) {
    STD_TORCH_CHECK(!(rng_state && bits), "a mask is random (rng_state) or given (bits), not both");
    if (rng_state) return random_mask(*rng_state, p_zero, x.get_device_index());
    if (bits) return MaskRequest::packed(checked_bits(*bits, x.numel(), x.get_device_index()));
    return {};
  }

  static Tensor new_bytes(const Tensor& like, int64_t count) {
    return torch::stable::new_empty(like, {count}, ScalarType::Byte);
  }

  // Shapes x into y, which may be x. Writes the bits of M * 1[abs(x) <= 1] to `within_one` unless it is null.
  static void run_shape(const Tensor& x, Tensor& y, Tensor* within_one, const std::optional<Tensor>& rng_state,
                        const std::optional<Tensor>& bits, double p_zero, bool binarize) {
    check_x(x);
    const MaskRequest mask = mask_of(x, rng_state, bits, p_zero);
    ShapeArguments call{dtype_of(x), x.const_data_ptr(), nullptr, nullptr, x.numel(), mask, binarize};
    call.y = y.mutable_data_ptr();
    if (within_one) call.within_one = static_cast<uint8_t*>(within_one->mutable_data_ptr());
    Backend(x).shape(call);
  }

  static Tensor shape(Tensor x, std::optional<Tensor> rng_state, std::optional<Tensor> bits, double p_zero, bool binarize) {
    Tensor y = Backend::new_output(x);
    run_shape(x, y, nullptr, rng_state, bits, p_zero, binarize);
    return y;
  }

  static void shape_(Tensor x, std::optional<Tensor> rng_state, std::optional<Tensor> bits, double p_zero, bool binarize) {
    run_shape(x, x, nullptr, rng_state, bits, p_zero, binarize);
  }

  static std::tuple<Tensor, Tensor> shape_clipped(Tensor x, std::optional<Tensor> rng_state, std::optional<Tensor> bits,
                                                  double p_zero, bool binarize) {
    Tensor y = Backend::new_output(x), within_one = new_bytes(x, bytes_for(x.numel()));
    run_shape(x, y, &within_one, rng_state, bits, p_zero, binarize);
    return {y, within_one};
  }

  static Tensor shape_clipped_(Tensor x, std::optional<Tensor> rng_state, std::optional<Tensor> bits, double p_zero,
                               bool binarize) {
    Tensor within_one = new_bytes(x, bytes_for(x.numel()));
    run_shape(x, x, &within_one, rng_state, bits, p_zero, binarize);
    return within_one;
  }

  static Tensor pack(Tensor x) {
    check_x(x);
    const Dtype dtype = dtype_of(x, /*may_be_bytes=*/true);
    Tensor bits = new_bytes(x, bytes_for(x.numel()));
    Backend(x).pack(dtype, x.const_data_ptr(), static_cast<uint8_t*>(bits.mutable_data_ptr()), x.numel());
    return bits;
  }

  static Tensor pack_random(Tensor rng_state, int64_t n, double p_zero) {
    STD_TORCH_CHECK(n >= 0, "n must not be negative, not ", n);
    const MaskRequest mask = random_mask(rng_state, p_zero, rng_state.get_device_index());
    Tensor bits = new_bytes(rng_state, bytes_for(n));
    Backend(rng_state).pack_random(mask, static_cast<uint8_t*>(bits.mutable_data_ptr()), n);
    return bits;
  }

  static Tensor pack_top(Tensor x, int64_t row, int64_t count) {
    STD_TORCH_CHECK(Backend::owns(x), "x must be a ", Backend::kKey, " tensor");
    STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
    const int64_t n = x.numel();
    STD_TORCH_CHECK(row >= 1 && row <= UINT32_MAX && n % row == 0, "row must divide the ", n,
                    " elements of x and be from 1 to 2^32 - 1, not ", row);
    STD_TORCH_CHECK(count >= 0 && count <= row, "count must be from 0 to row=", row, ", not ", count);
    const Dtype dtype = dtype_of(x);
    Tensor bits = new_bytes(x, bytes_for(n));
    Backend(x).pack_top({dtype, x.const_data_ptr(), static_cast<uint8_t*>(bits.mutable_data_ptr()), n, row, count});
    return bits;
  }

  static Tensor unpack(Tensor bits, int64_t n) {
    STD_TORCH_CHECK(n >= 0, "n must not be negative, not ", n);
    const uint8_t* from = checked_bits(bits, n, bits.get_device_index());
    Tensor out = torch::stable::new_empty(bits, {n}, ScalarType::Bool);
    Backend(bits).unpack(from, static_cast<uint8_t*>(out.mutable_data_ptr()), n);
    return out;
  }

  template <class Impl>
  static void implement(const Impl& impl) {
    impl("shape", TORCH_BOX(&shape));
    impl("shape_", TORCH_BOX(&shape_));
    impl("shape_clipped", TORCH_BOX(&shape_clipped));
    impl("shape_clipped_", TORCH_BOX(&shape_clipped_));
    impl("pack", TORCH_BOX(&pack));
    impl("pack_random", TORCH_BOX(&pack_random));
    impl("pack_top", TORCH_BOX(&pack_top));
    impl("unpack", TORCH_BOX(&unpack));
  }
};

}  // namespace fastshape
