// C functions for the test, and the loop over blocks and warps.
#include <thread>
#include <vector>

#include "kernels.cuh"

void emulation::run(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  std::barrier<> barrier(32);
  warp = &barrier;
  last_grid = blocks;
  std::vector<std::thread> lanes;
  for (unsigned lane = 0; lane < 32; ++lane)
    lanes.emplace_back([&, lane] {
      gridDim.x = blocks;
      for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (unsigned first = 0; first < threads; first += 32) {
          threadIdx.x = first + lane;
          kernel();
        }
    });
  for (std::thread& lane : lanes) lane.join();
}

using namespace fastshape;

extern "C" {

void set_device(int multiprocessors, int blocks_per_multiprocessor) {
  emulation::multiprocessors = multiprocessors;
  emulation::blocks_per_multiprocessor = blocks_per_multiprocessor;
}

unsigned last_grid() { return emulation::last_grid; }

int shape(int dtype, const void* x, void* y, uint8_t* within_one, int64_t n, const int64_t* rng_state, const uint8_t* bits,
          double p_zero, int binarize) {
  MaskRequest mask;
  if (rng_state) mask = MaskRequest::random(rng_state, p_zero);
  if (bits) mask = MaskRequest::packed(bits);
  return cuda::shape({static_cast<Dtype>(dtype), x, y, within_one, n, mask, binarize != 0}, nullptr);
}

int pack(int dtype, const void* x, uint8_t* bits, int64_t n) {
  return cuda::pack(static_cast<Dtype>(dtype), x, bits, n, nullptr);
}

int pack_random(const int64_t* rng_state, double p_zero, uint8_t* bits, int64_t n) {
  return cuda::pack_random(MaskRequest::random(rng_state, p_zero), bits, n, nullptr);
}

int unpack(const uint8_t* bits, uint8_t* out, int64_t n) { return cuda::unpack(bits, out, n, nullptr); }

}
