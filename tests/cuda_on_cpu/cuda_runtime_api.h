// Enough of CUDA for a C++ compiler to run csrc/cuda/kernels.cu: one warp at a time, a thread a lane.
#pragma once

#include <barrier>
#include <cstddef>
#include <cstdint>
#include <functional>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaDevAttrMultiProcessorCount = 16;

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx, gridDim;

namespace emulation {

inline int multiprocessors = 2, blocks_per_multiprocessor = 1;
inline unsigned last_grid = 0;
inline std::barrier<>* warp = nullptr;
inline uint32_t exchanged[32];

void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel);

}  // namespace emulation

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = emulation::multiprocessors;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* value, Kernel, int, size_t) {
  *value = emulation::blocks_per_multiprocessor;
  return cudaSuccess;
}

inline uint32_t __shfl_sync(unsigned, uint32_t value, int lane, int width) {
  const unsigned self = threadIdx.x % 32;
  emulation::exchanged[self] = value;
  emulation::warp->arrive_and_wait();
  const uint32_t other = emulation::exchanged[self / width * width + lane % width];
  emulation::warp->arrive_and_wait();
  return other;
}
