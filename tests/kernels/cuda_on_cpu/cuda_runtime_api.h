// The part of CUDA that a C++ compiler needs to run csrc/cuda/*.cu: one warp at a time, its lanes in turn.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaDevAttrMultiProcessorCount = 16;

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

using std::max, std::min;

namespace emulation {

inline int multiprocessors = 2, blocks_per_multiprocessor = 1;
inline unsigned last_grid = 0;
inline bool failed = false;  // a GPU would have stopped or waited forever

void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel);

// Returns when all lanes have called it.
void wait_for_lanes();

// Two sets of values: a lane may write for its next exchange before other lanes have read its value of this one.
inline uint64_t values[2][32];
inline unsigned exchanges[32];

template <class T>
T from_lane(T value, unsigned other) {
  const unsigned lane = threadIdx.x % 32, set = exchanges[lane]++ % 2;
  memcpy(values[set] + lane, &value, sizeof value);
  wait_for_lanes();
  memcpy(&value, values[set] + other, sizeof value);
  return value;
}

}  // namespace emulation

inline cudaError_t cudaGetLastError() {
  return std::exchange(emulation::failed, false) ? cudaErrorInvalidValue : cudaSuccess;
}
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
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}

template <class T>
T __shfl_sync(unsigned, T value, int lane, int width) {
  return emulation::from_lane(value, threadIdx.x % 32 / width * width + lane % width);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::from_lane(value, threadIdx.x % 32 ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool flag) {
  unsigned flags = 0;
  for (unsigned lane = 0; lane < 32; ++lane) flags |= static_cast<unsigned>(emulation::from_lane(flag, lane)) << lane;
  return flags;
}
inline void __syncwarp() { emulation::wait_for_lanes(); }

template <class T>
T __ldg(const T* from) {
  T value;
  memcpy(&value, from, sizeof value);
  emulation::failed |= reinterpret_cast<uintptr_t>(from) % sizeof(T) != 0;
  return value;
}
inline int __popc(uint32_t bits) { return std::popcount(bits); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return static_cast<unsigned __int128>(a) * b >> 64; }
inline void atomicAdd(unsigned* sum, unsigned value) { __atomic_fetch_add(sum, value, __ATOMIC_RELAXED); }
inline void atomicAdd(unsigned long long* sum, unsigned long long value) {
  __atomic_fetch_add(sum, value, __ATOMIC_RELAXED);
}
