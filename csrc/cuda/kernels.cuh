// CUDA kernels on raw device pointers and a stream. No function waits: each launches a kernel and returns the error of the
// launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "fastshape/arguments.h"
#include "fastshape/dispatch.h"
#include "fastshape/mask.h"

namespace fastshape::cuda {

cudaError_t shape(const ShapeArguments& call, cudaStream_t stream);                               // y = B(x) * M or x * M
cudaError_t ones(const OnesArguments& call, cudaStream_t stream);                                 // bits of B(x) * M
cudaError_t pack(Dtype dtype, const void* x, uint8_t* bits, int64_t n, cudaStream_t stream);      // bits of x > 0
cudaError_t pack_random(const MaskRequest& mask, uint8_t* bits, int64_t n, cudaStream_t stream);  // bits of a random mask
cudaError_t pack_top(const TopArguments& call, cudaStream_t stream);                              // each row's largest
cudaError_t unpack(const uint8_t* bits, uint8_t* out, int64_t n, cudaStream_t stream);            // 0 or 1, one byte per element

}  // namespace fastshape::cuda
