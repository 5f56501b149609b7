// The numbers of lanes and warps, and how kernels are launched.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "tile.cuh"

namespace fastshape::cuda {

constexpr unsigned kThreads = 256;
constexpr unsigned kWarps = kThreads / kLanes;  // per block
// Four blocks with 64 registers per thread fill a multiprocessor. Each of the 1024 threads has 64 bytes of loads in flight.
constexpr int kMinBlocks = 4;
// The number of 16-byte loads that a thread issues before it uses the first.
constexpr int kLoadsInFlight = 4;

__device__ __forceinline__ unsigned lane_index() { return threadIdx.x % kLanes; }
__device__ __forceinline__ int64_t warp_index() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
}
__device__ __forceinline__ int64_t warp_count() { return static_cast<int64_t>(gridDim.x) * kWarps; }

inline bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

inline int64_t divided_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Launches enough blocks for `units` of work, but at most kWaves times as many as the device can hold. With more work, blocks
// loop, all equally often.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), unsigned threads, int64_t units, int64_t units_per_block,
                   cudaStream_t stream, Arguments... arguments) {
  constexpr int64_t kWaves = 4;
  if (units == 0) return cudaSuccess;
  int64_t blocks = divided_up(units, units_per_block);
  int device = 0, multiprocessors = 0, per_multiprocessor = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)) return error;
  if (blocks > multiprocessors) {
    if (cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, threads, 0))
      return error;
    const int64_t most = kWaves * multiprocessors * std::max(per_multiprocessor, 1);
    blocks = divided_up(blocks, divided_up(blocks, most));
  }
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace fastshape::cuda
