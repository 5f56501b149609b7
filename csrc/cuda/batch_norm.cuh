// The CUDA kernels of shape + BatchNorm2d (+ ReLU), step by step, as csrc/batch_norm_ops.h asks for them. Raw device
// pointers and a stream; nothing waits: each function launches and returns what the launch said.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "fastshape/arguments.h"
#include "fastshape/batch_norm.h"

namespace fastshape::cuda {

// Exact ones a channel.
cudaError_t count(const uint8_t* ones, int64_t n, Channels channels, int64_t* counts, cudaStream_t stream);

// Statistics, running ones and table from the counts (which may be null without batch statistics).
cudaError_t normalize(const BatchNorm& norm, Dtype dtype, const int64_t* counts, int64_t n, Channels channels,
                      double* statistics, void* table, cudaStream_t stream);

cudaError_t look_up(const LookUpArguments& call, cudaStream_t stream);  // y = table[bit][channel]

// Sums of dy over zeros and over ones: float64 (partials, 2, channels), which `differentiate` adds up. What is added to
// what, and in which order, depends on the shape and the dtype alone. Of a channel's m elements, float additions join at
// most 64 in a row, and float64 the rest: the error is below 64 * 2^-24 times the sum of the magnitudes.
int64_t partials(int64_t n, Channels channels);
cudaError_t sums(Dtype dtype, const void* grad, const uint8_t* ones, int64_t n, Channels channels, double* sums,
                 cudaStream_t stream);

// d(weight) and d(bias), unless null, and the coefficients of `grad_input`.
cudaError_t differentiate(const BatchNorm& norm, Dtype dtype, const double* statistics, const double* sums,
                          int64_t partials, int64_t n, Channels channels, void* grad_weight, void* grad_bias,
                          void* coefficients, cudaStream_t stream);

cudaError_t grad_input(const GradInputArguments& call, cudaStream_t stream);  // dx = M (scale[a] dy + shift[a])

}  // namespace fastshape::cuda
