// The loop over blocks and warps, and C functions for the tests.
#include <ucontext.h>

#include "batch_norm.cuh"
#include "channels.cuh"
#include "kernels.cuh"

namespace emulation {
namespace {

// A lane runs until it waits for the others; then the next lane runs.
struct Lane {
  ucontext_t context;
  Index thread, block;
  bool done;
  unsigned waits;
  alignas(64) char stack[1 << 16];
};

Lane lanes[32];
Lane* running;
ucontext_t scheduler;
const std::function<void()>* kernel;
unsigned threads;

void run_lane() {
  const auto lane = static_cast<unsigned>(running - lanes);
  for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)
    for (threadIdx.x = lane; threadIdx.x < threads; threadIdx.x += 32) (*kernel)();
  running->done = true;
}

}  // namespace

void wait_for_lanes() {
  Lane& lane = *running;
  lane.thread = threadIdx, lane.block = blockIdx;
  ++lane.waits;
  swapcontext(&lane.context, &scheduler);
  threadIdx = lane.thread, blockIdx = lane.block;
}

void run(unsigned blocks, unsigned threads_of_a_block, const std::function<void()>& body) {
  kernel = &body, threads = threads_of_a_block;
  gridDim.x = last_grid = blocks;
  for (Lane& lane : lanes) {
    lane.done = false, lane.waits = 0;
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack;
    lane.context.uc_stack.ss_size = sizeof lane.stack;
    lane.context.uc_link = &scheduler;
    makecontext(&lane.context, run_lane, 0);
  }
  for (unsigned left = 32; left > 0;) {
    left = 0;
    for (Lane& lane : lanes) {
      if (lane.done) continue;
      running = &lane;
      swapcontext(&scheduler, &lane.context);
      left += !lane.done;
    }
  }
  for (const Lane& lane : lanes) failed |= lane.waits != lanes[0].waits;
}

}  // namespace emulation

using namespace fastshape;

namespace {

MaskRequest mask_of(const int64_t* rng_state, const uint8_t* bits, double p_zero) {
  if (rng_state) return MaskRequest::random(rng_state, p_zero);
  return bits ? MaskRequest::packed(bits) : MaskRequest{};
}

Dtype dtype_of(int code) { return static_cast<Dtype>(code); }

}  // namespace

extern "C" {

void set_device(int multiprocessors, int blocks_per_multiprocessor) {
  emulation::multiprocessors = multiprocessors;
  emulation::blocks_per_multiprocessor = blocks_per_multiprocessor;
}

unsigned last_grid() { return emulation::last_grid; }

int shape(int dtype, const void* x, void* y, uint8_t* within_one, int64_t n, const int64_t* rng_state, const uint8_t* bits,
          double p_zero, int binarize) {
  return cuda::shape({dtype_of(dtype), x, y, within_one, n, mask_of(rng_state, bits, p_zero), binarize != 0}, nullptr);
}

int ones(int dtype, const void* x, uint8_t* ones, uint8_t* within_one, int64_t n, const int64_t* rng_state,
         const uint8_t* bits, double p_zero) {
  return cuda::ones({dtype_of(dtype), x, ones, within_one, n, mask_of(rng_state, bits, p_zero)}, nullptr);
}

int pack(int dtype, const void* x, uint8_t* bits, int64_t n) { return cuda::pack(dtype_of(dtype), x, bits, n, nullptr); }

int pack_random(const int64_t* rng_state, double p_zero, uint8_t* bits, int64_t n) {
  return cuda::pack_random(mask_of(rng_state, nullptr, p_zero), bits, n, nullptr);
}

int pack_top(int dtype, const void* x, uint8_t* bits, int64_t n, int64_t row, int64_t count) {
  return cuda::pack_top({dtype_of(dtype), x, bits, n, row, count}, nullptr);
}

int unpack(const uint8_t* bits, uint8_t* out, int64_t n) { return cuda::unpack(bits, out, n, nullptr); }

int count(const uint8_t* ones, int64_t n, int64_t channels, int64_t inner, int64_t* counts) {
  return cuda::count(ones, n, {channels, inner}, counts, nullptr);
}

int normalize(const void* weight, const void* bias, int parameter_dtype, void* running_mean, void* running_var,
              int running_dtype, int training, double momentum, double eps, int relu, int dtype, const int64_t* counts,
              int64_t n, int64_t channels, double* statistics, void* table) {
  const BatchNorm norm{weight, bias, dtype_of(parameter_dtype), running_mean, running_var, dtype_of(running_dtype),
                       training != 0, momentum, eps, relu != 0};
  return cuda::normalize(norm, dtype_of(dtype), counts, n, {channels, 1}, statistics, table, nullptr);
}

int look_up(int dtype, const uint8_t* ones, int64_t n, int64_t channels, int64_t inner, const void* table, void* y) {
  return cuda::look_up({dtype_of(dtype), ones, n, {channels, inner}, table, y}, nullptr);
}

int64_t partials(int64_t n, int64_t channels, int64_t inner) { return cuda::partials(n, {channels, inner}); }

int sums(int dtype, const void* grad, const uint8_t* ones, int64_t n, int64_t channels, int64_t inner, double* sums) {
  return cuda::sums(dtype_of(dtype), grad, ones, n, {channels, inner}, sums, nullptr);
}

int differentiate(const void* weight, const void* bias, int parameter_dtype, int training, int relu, int dtype,
                  const double* statistics, const double* sums, int64_t partials, int64_t n, int64_t channels,
                  void* grad_weight, void* grad_bias, void* coefficients) {
  BatchNorm norm{};
  norm.weight = weight;
  norm.bias = bias;
  norm.parameter_dtype = dtype_of(parameter_dtype);
  norm.batch_statistics = training != 0;
  norm.relu = relu != 0;
  return cuda::differentiate(norm, dtype_of(dtype), statistics, sums, partials, n, {channels, 1}, grad_weight, grad_bias,
                             coefficients, nullptr);
}

int grad_input(int dtype, const void* grad, const uint8_t* ones, int64_t n, int64_t channels, int64_t inner,
               const int64_t* rng_state, const uint8_t* bits, double p_zero, const void* coefficients, void* dx) {
  return cuda::grad_input({dtype_of(dtype), grad, ones, n, {channels, inner}, mask_of(rng_state, bits, p_zero),
                           coefficients, dx}, nullptr);
}

int64_t divided(int64_t x, int64_t divisor) { return cuda::Divisor(divisor).divide(x); }

}
