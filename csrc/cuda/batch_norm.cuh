// The CUDA kernels of shape + BatchNorm2d (+ ReLU), one for each step of csrc/batch_norm_ops.h. They take raw device pointers
// and a stream. No function waits: each launches a kernel and returns the error of the launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "fastshape/arguments.h"
#include "fastshape/batch_norm.h"

namespace fastshape::cuda {

// The exact number of ones per channel.
cudaError_t count(const uint8_t* ones, int64_t n, Channels channels, int64_t* counts, cudaStream_t stream);

// Writes statistics, running statistics and table. `counts` may be null without batch statistics.
cudaError_t normalize(const BatchNorm& norm, Dtype dtype, const int64_t* counts, int64_t n, Channels channels,
                      double* statistics, void* table, cudaStream_t stream);

cudaError_t look_up(const LookUpArguments& call, cudaStream_t stream);  // y = table[bit][channel]

// Sums of dy over zeros and over ones: float64 (partials, 2, channels), which `differentiate` adds up. The order of all
// additions depends on the shape and the dtype alone. At most 64 elements of a channel are added up in float, and the results
// in float64, so that the error is below 64 * 2^-24 times the sum of the magnitudes.
int64_t partials(int64_t n, Channels channels);
cudaError_t sums(Dtype dtype, const void* grad, const uint8_t* ones, int64_t n, Channels channels, double* sums,
                 cudaStream_t stream);

// Writes d(weight) and d(bias), unless they are null, and the coefficients of `grad_input`.
cudaError_t differentiate(const BatchNorm& norm, Dtype dtype, const double* statistics, const double* sums,
                          int64_t partials, int64_t n, Channels channels, void* grad_weight, void* grad_bias,
                          void* coefficients, cudaStream_t stream);

cudaError_t grad_input(const GradInputArguments& call, cudaStream_t stream);  // dx = M (scale[a] dy + shift[a])

}  // namespace fastshape::cuda
