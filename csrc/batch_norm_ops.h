// The ops shape + BatchNorm2d (+ ReLU) of fastshape/_ops.py as torch calls them: the part that all devices share.
#pragma once

#include <optional>
#include <tuple>

#include "fastshape/batch_norm.h"
#include "ops.h"

namespace fastshape {

// In addition to what `Ops` needs, a `Backend` has a kernel for each step, and partials(n, channels): the number of partial
// sum pairs per channel. `sums` writes them, and `differentiate` adds them up in order.
template <class Backend>
struct BatchNormOps {
  using Base = Ops<Backend>;

  static Channels channels_of(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 4, "x must have 4 dimensions (N, C, H, W), not ", x.dim());
    const int64_t count = x.size(1);
    const bool planes = x.is_contiguous();
    STD_TORCH_CHECK(planes || x.stride(1) == 1, "x must be contiguous or channels_last");
    return {count, planes ? x.size(2) * x.size(3) : 1};
  }

  static Tensor new_like(const Tensor& like, std::initializer_list<int64_t> size, ScalarType dtype) {
    return torch::stable::new_empty(like, size, dtype);
  }

  // The data of a vector with one number per channel; null where there is no vector.
  static const void* checked_vector(const char* name, const std::optional<Tensor>& t, const Tensor& x, Dtype dtype) {
    if (!t) return nullptr;
    STD_TORCH_CHECK(Backend::owns(*t) && t->get_device_index() == x.get_device_index() && t->is_contiguous() &&
                        t->numel() == x.size(1) && dtype_of(*t) == dtype,
                    name, " must be contiguous, on the device of x, with ", x.size(1),
                    " numbers; weight and bias need one dtype, and so do running_mean and running_var");
    return t->const_data_ptr();
  }

  static BatchNorm parameters_of(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                 bool training, bool relu) {
    STD_TORCH_CHECK(weight.has_value() == bias.has_value(), "weight and bias: give both or neither");
    BatchNorm norm{};
    if (weight) norm.parameter_dtype = dtype_of(*weight);
    norm.weight = checked_vector("weight", weight, x, norm.parameter_dtype);
    norm.bias = checked_vector("bias", bias, x, norm.parameter_dtype);
    norm.batch_statistics = training;
    norm.relu = relu;
    return norm;
  }

  using Forward = std::tuple<Tensor, Tensor, Tensor>;

  // Writes into y, which may be x. Returns the bits of B(x) * M, the bits of M * 1[abs(x) <= 1] (empty unless `clipped`),
  // and the statistics, float64 (2, C): mean and 1 / sqrt(var + eps).
  static Forward run(const Tensor& x, Tensor& y, const std::optional<Tensor>& rng_state,
                     const std::optional<Tensor>& bits, double p_zero, const std::optional<Tensor>& weight,
                     const std::optional<Tensor>& bias, std::optional<Tensor>& running_mean,
                     std::optional<Tensor>& running_var, bool training, double momentum, double eps, bool relu,
                     bool clipped) {
    Base::check_x(x);
    const Channels channels = channels_of(x);
    const Dtype dtype = dtype_of(x);
    const int64_t n = x.numel();
    BatchNorm norm = parameters_of(x, weight, bias, training, relu);
    STD_TORCH_CHECK(running_mean.has_value() == running_var.has_value(), "running_mean and running_var: give both or neither");
    STD_TORCH_CHECK(training || running_mean, "without training, running_mean and running_var are needed");
    if (running_mean) {
      norm.running_dtype = dtype_of(*running_mean);
      checked_vector("running_mean", running_mean, x, norm.running_dtype);
      checked_vector("running_var", running_var, x, norm.running_dtype);
      norm.running_mean = running_mean->mutable_data_ptr();
      norm.running_var = running_var->mutable_data_ptr();
    }
    norm.momentum = momentum;
    norm.eps = eps;

    const MaskRequest mask = Base::mask_of(x, rng_state, bits, p_zero);
    Tensor ones = Base::new_bytes(x, bytes_for(n)), within_one = Base::new_bytes(x, clipped ? bytes_for(n) : 0);
    Tensor statistics = new_like(x, {2, channels.count}, ScalarType::Double);
    Tensor counts = new_like(x, {training ? channels.count : 0}, ScalarType::Long);
    Tensor table = torch::stable::new_empty(x, {2, channels.count});

    const Backend backend(x);
    auto* one_bits = static_cast<uint8_t*>(ones.mutable_data_ptr());
    auto* within_one_bits = clipped ? static_cast<uint8_t*>(within_one.mutable_data_ptr()) : nullptr;
    auto* count_data = static_cast<int64_t*>(counts.mutable_data_ptr());
    backend.ones({dtype, x.const_data_ptr(), one_bits, within_one_bits, n, mask});
    if (training) backend.count(one_bits, n, channels, count_data);
    backend.normalize(norm, dtype, count_data, n, channels, static_cast<double*>(statistics.mutable_data_ptr()),
                      table.mutable_data_ptr());
    backend.look_up({dtype, one_bits, n, channels, table.const_data_ptr(), y.mutable_data_ptr()});
    return {ones, within_one, statistics};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
      Tensor x, std::optional<Tensor> rng_state, std::optional<Tensor> bits, double p_zero, std::optional<Tensor> weight,
      std::optional<Tensor> bias, std::optional<Tensor> running_mean, std::optional<Tensor> running_var, bool training,
      double momentum, double eps, bool relu, bool clipped) {
    Tensor y = Backend::new_output(x);
    auto [ones, within_one, statistics] = run(x, y, rng_state, bits, p_zero, weight, bias, running_mean, running_var,
                                              training, momentum, eps, relu, clipped);
    return {y, ones, within_one, statistics};
  }

  static Forward forward_(Tensor x, std::optional<Tensor> rng_state, std::optional<Tensor> bits, double p_zero,
                          std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> running_mean,
                          std::optional<Tensor> running_var, bool training, double momentum, double eps, bool relu,
                          bool clipped) {
    return run(x, x, rng_state, bits, p_zero, weight, bias, running_mean, running_var, training, momentum, eps, relu,
               clipped);
  }

  // Returns dx (empty unless `needs_x`), d(weight) and d(bias). The latter two have the parameters' dtype and are empty
  // where there is no weight.
  static Forward backward(Tensor grad, Tensor ones, Tensor statistics, std::optional<Tensor> rng_state,
                          std::optional<Tensor> bits, double p_zero, std::optional<Tensor> weight,
                          std::optional<Tensor> bias, bool training, bool relu, bool needs_x) {
    Base::check_x(grad);
    const Channels channels = channels_of(grad);
    const Dtype dtype = dtype_of(grad);
    const int64_t n = grad.numel();
    const BatchNorm norm = parameters_of(grad, weight, bias, training, relu);
    const MaskRequest mask = Base::mask_of(grad, rng_state, bits, p_zero);
    const uint8_t* one_bits = Base::checked_bits(ones, n, grad.get_device_index());
    STD_TORCH_CHECK(Backend::owns(statistics) && statistics.get_device_index() == grad.get_device_index() &&
                        statistics.scalar_type() == ScalarType::Double && statistics.is_contiguous() &&
                        statistics.numel() == 2 * channels.count,
                    "statistics must be a contiguous float64 ", Backend::kKey, " tensor of ", 2 * channels.count,
                    " numbers, on the device of grad; it has ", statistics.numel(), " numbers");

    const ScalarType accumulator = dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
    Tensor coefficients = new_like(grad, {4, channels.count}, accumulator);
    Tensor grad_weight = weight ? torch::stable::empty_like(*weight) : torch::stable::new_empty(grad, {0});
    Tensor grad_bias = bias ? torch::stable::empty_like(*bias) : torch::stable::new_empty(grad, {0});
    Tensor dx = needs_x ? Backend::new_output(grad) : torch::stable::new_empty(grad, {0});

    const Backend backend(grad);
    const int64_t partials = backend.partials(n, channels);
    Tensor sums = new_like(grad, {partials, 2, channels.count}, ScalarType::Double);
    auto* sum_data = static_cast<double*>(sums.mutable_data_ptr());
    backend.sums(dtype, grad.const_data_ptr(), one_bits, n, channels, sum_data);
    backend.differentiate(norm, dtype, static_cast<const double*>(statistics.const_data_ptr()), sum_data, partials, n, channels,
                          weight ? grad_weight.mutable_data_ptr() : nullptr, weight ? grad_bias.mutable_data_ptr() : nullptr,
                          coefficients.mutable_data_ptr());
    if (needs_x)
      backend.grad_input({dtype, grad.const_data_ptr(), one_bits, n, channels, mask, coefficients.const_data_ptr(),
                          dx.mutable_data_ptr()});
    return {dx, grad_weight, grad_bias};
  }

  template <class Impl>
  static void implement(const Impl& impl) {
    impl("shaped_batch_norm", TORCH_BOX(&forward));
    impl("shaped_batch_norm_", TORCH_BOX(&forward_));
    impl("shaped_batch_norm_backward", TORCH_BOX(&backward));
  }
};

}  // namespace fastshape
