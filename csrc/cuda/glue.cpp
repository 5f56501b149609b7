// The CUDA kernels as torch ops, on the current stream of the tensor's device.
#include "glue.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "batch_norm.cuh"
#include "kernels.cuh"
#include "registration.h"

namespace fastshape::cuda {
namespace {

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Raises the error of a launch as torch does.
void check(cudaError_t error) { STD_CUDA_CHECK(error); }

struct Backend {
  static constexpr const char* kKey = "CUDA";
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit Backend(const Tensor& t) : guard(t.get_device_index()), stream(current_stream(t.get_device_index())) {}

  static bool owns(const Tensor& t) { return t.is_cuda(); }
  static Tensor new_output(const Tensor& x) { return torch::stable::empty_like(x); }

  void shape(const ShapeArguments& call) const { check(cuda::shape(call, stream)); }
  void pack(Dtype dtype, const void* x, uint8_t* bits, int64_t n) const { check(cuda::pack(dtype, x, bits, n, stream)); }
  void pack_random(const MaskRequest& mask, uint8_t* bits, int64_t n) const {
    check(cuda::pack_random(mask, bits, n, stream));
  }
  void pack_top(const TopArguments& call) const { check(cuda::pack_top(call, stream)); }
  void unpack(const uint8_t* bits, uint8_t* out, int64_t n) const { check(cuda::unpack(bits, out, n, stream)); }

  void ones(const OnesArguments& call) const { check(cuda::ones(call, stream)); }
  void count(const uint8_t* ones, int64_t n, Channels channels, int64_t* counts) const {
    check(cuda::count(ones, n, channels, counts, stream));
  }
  void normalize(const BatchNorm& norm, Dtype dtype, const int64_t* counts, int64_t n, Channels channels,
                 double* statistics, void* table) const {
    check(cuda::normalize(norm, dtype, counts, n, channels, statistics, table, stream));
  }
  void look_up(const LookUpArguments& call) const { check(cuda::look_up(call, stream)); }
  static int64_t partials(int64_t n, Channels channels) { return cuda::partials(n, channels); }
  void sums(Dtype dtype, const void* grad, const uint8_t* ones, int64_t n, Channels channels, double* sums) const {
    check(cuda::sums(dtype, grad, ones, n, channels, sums, stream));
  }
  void differentiate(const BatchNorm& norm, Dtype dtype, const double* statistics, const double* sums, int64_t partials,
                     int64_t n, Channels channels, void* grad_weight, void* grad_bias, void* coefficients) const {
    check(cuda::differentiate(norm, dtype, statistics, sums, partials, n, channels, grad_weight, grad_bias, coefficients,
                              stream));
  }
  void grad_input(const GradInputArguments& call) const { check(cuda::grad_input(call, stream)); }
};

}  // namespace

void register_ops() { register_backend<Backend>(); }

}  // namespace fastshape::cuda
