// BatchNorm (and ReLU) of a binary map, channel by channel: y is one of two numbers, and so is its derivative.
//
// With k ones among the m elements of a channel: mean = k / m, var = mean (1 - mean), invstd = 1 / sqrt(var + eps),
// scale = weight invstd, y(0) = bias - mean scale, y(1) = bias + (1 - mean) scale, then ReLU of both. k is an exact
// integer. Everything after it is float64, and each operation rounds once (no fused multiply-add). y is then rounded to the
// dtype of the map. So every backend writes the same bits, except for the bit pattern of a NaN.
#pragma once

#include <cmath>
#include <cstdint>

#include "fastshape/dispatch.h"
#include "fastshape/macros.h"
#include "fastshape/mask.h"
#include "fastshape/numbers.h"

namespace fastshape {

// Element i of a dense map belongs to channel i / inner % count. `inner` is the size of a plane in a contiguous map and 1 in
// a channels_last map.
struct Channels {
  int64_t count, inner;

  FASTSHAPE_FUNCTION int64_t of(int64_t element) const { return element / inner % count; }
};

// The BatchNorm layer. Each array has one number per channel. A null weight means ones, a null bias zeros.
struct BatchNorm {
  const void *weight, *bias;
  Dtype parameter_dtype;  // of weight and bias
  void *running_mean, *running_var;
  Dtype running_dtype;
  bool batch_statistics;  // false: the running statistics are used
  double momentum, eps;   // momentum: the weight of the new value in the running statistics
  bool relu;
};

// What the zeros and ones of one channel become, in float64.
struct ChannelTable {
  double mean, invstd;
  double scale;           // weight invstd
  double normalized[2];   // xhat of a zero and of a one
  double y[2];            // before ReLU
};

// Products and sums that the compiler must not fuse: a fused multiply-add would change the bits.
FASTSHAPE_FUNCTION double times(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}
FASTSHAPE_FUNCTION double plus(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}
FASTSHAPE_FUNCTION float times(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
FASTSHAPE_FUNCTION float plus(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

FASTSHAPE_FUNCTION double variance_of(double mean) { return times(mean, plus(1.0, -mean)); }

FASTSHAPE_FUNCTION double inverse_deviation(double variance, double eps) { return 1.0 / sqrt(plus(variance, eps)); }

FASTSHAPE_FUNCTION ChannelTable channel_table(const BatchNorm& norm, double mean, double invstd, int64_t channel) {
  const double weight = norm.weight ? load_number(norm.parameter_dtype, norm.weight, channel) : 1.0;
  const double bias = norm.bias ? load_number(norm.parameter_dtype, norm.bias, channel) : 0.0;
  const double scale = times(weight, invstd);
  return {mean,
          invstd,
          scale,
          {times(-mean, invstd), times(plus(1.0, -mean), invstd)},
          {plus(bias, times(-mean, scale)), plus(bias, times(plus(1.0, -mean), scale))}};
}

// The bit pattern that is written for y: rounded, then ReLU, which keeps a NaN.
template <class Number>
FASTSHAPE_FUNCTION typename Number::Bits table_entry(double y, bool relu) {
  const auto pattern = Value<Number>::round(y);
  const auto value = Value<Number>::load(pattern);
  return relu && value <= 0 ? typename Number::Bits{0} : pattern;
}

// Whether the ReLU lets the gradient through for the value that was written for y.
template <class Number>
FASTSHAPE_FUNCTION bool relu_passes(double y, bool relu) {
  return !(relu && Value<Number>::load(Value<Number>::round(y)) <= 0);
}

// (1 - momentum) old + momentum now.
FASTSHAPE_FUNCTION double running_value(double old, double now, double momentum) {
  return plus(times(plus(1.0, -momentum), old), times(momentum, now));
}

// Forward, one channel. Writes its mean to statistics[channel] and its invstd to statistics[channels + channel]; the bit
// pattern of a zero to table[channel] and that of a one to table[channels + channel]. Updates the running statistics.
template <class Number>
FASTSHAPE_FUNCTION void normalize_channel(const BatchNorm& norm, int64_t ones, int64_t elements, int64_t channel,
                                          int64_t channels, double* statistics, typename Number::Bits* table) {
  double mean, variance;
  if (norm.batch_statistics) {
    mean = static_cast<double>(ones) / static_cast<double>(elements);
    variance = variance_of(mean);
    if (norm.running_mean && elements > 0) {
      const double m = static_cast<double>(elements), unbiased = times(variance, m) / plus(m, -1.0);
      const auto update = [&](void* running, double now) {
        const double old = load_number(norm.running_dtype, running, channel);
        store_number(norm.running_dtype, running, channel, running_value(old, now, norm.momentum));
      };
      update(norm.running_mean, mean);
      update(norm.running_var, unbiased);
    }
  } else {
    mean = load_number(norm.running_dtype, norm.running_mean, channel);
    variance = load_number(norm.running_dtype, norm.running_var, channel);
  }
  const double invstd = inverse_deviation(variance, norm.eps);
  statistics[channel] = mean;
  statistics[channels + channel] = invstd;
  const ChannelTable t = channel_table(norm, mean, invstd, channel);
  table[channel] = table_entry<Number>(t.y[0], norm.relu);
  table[channels + channel] = table_entry<Number>(t.y[1], norm.relu);
}

// Backward, one element: dx = M (scale[a] dy + shift[a]), where a is the element of the binary map. Where scale is 0, as
// after a closed ReLU, dy is not read, so that its NaN or infinity has no effect.
template <class Accumulator>
struct Coefficients {
  Accumulator scale[2], shift[2];
};

template <class Accumulator>
FASTSHAPE_FUNCTION Accumulator grad_element(Accumulator grad, Accumulator scale, Accumulator shift) {
  return plus(scale != 0 ? times(scale, grad) : Accumulator{0}, shift);
}

// Backward, one channel. `sum[a]` is the sum of dy over the elements where the binary map is a. Writes d(weight) and d(bias),
// and returns the coefficients.
template <class Number>
FASTSHAPE_FUNCTION Coefficients<typename Value<Number>::Accumulator> differentiate_channel(
    const BatchNorm& norm, const double* statistics, const double sum[2], int64_t elements, int64_t channel,
    int64_t channels, double* grad_weight, double* grad_bias) {
  using Accumulator = typename Value<Number>::Accumulator;
  const ChannelTable t = channel_table(norm, statistics[channel], statistics[channels + channel], channel);
  const bool passes[2] = {relu_passes<Number>(t.y[0], norm.relu), relu_passes<Number>(t.y[1], norm.relu)};
  const double s0 = passes[0] ? sum[0] : 0.0, s1 = passes[1] ? sum[1] : 0.0;
  *grad_bias = plus(s0, s1);
  *grad_weight = plus(times(s0, t.normalized[0]), times(s1, t.normalized[1]));
  Coefficients<Accumulator> result;
  for (int a = 0; a < 2; ++a) {
    double shift = 0.0;
    if (norm.batch_statistics) {
      const double m = static_cast<double>(elements);
      shift = times(-t.scale, plus(*grad_bias / m, times(t.normalized[a], *grad_weight / m)));
    }
    result.scale[a] = static_cast<Accumulator>(passes[a] ? t.scale : 0.0);
    result.shift[a] = static_cast<Accumulator>(shift);
  }
  return result;
}

}  // namespace fastshape
