// Between torch's tensors and the CPU kernels: checks, allocates, splits into ranges. No maths here.
// LibTorch stable ABI only, so that one binary serves every torch from 2.10 on.
#include "glue.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fastshape::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// 32768 elements: torch's own grain for elementwise work.
constexpr int64_t kGrainBytes = 4096;

template <class F>
void over_ranges(int64_t n, const F& f) {
  torch::stable::parallel_for(0, bytes_for(n), kGrainBytes, [&](int64_t first, int64_t last) { f(Range{first, last}); });
}

// True where the elements fill one stretch of memory without gap or overlap, in whatever order.
bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  const auto sizes = t.sizes(), strides = t.strides();
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (const size_t d : order) {
    if (sizes[d] == 1) continue;
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

Dtype dtype_of(const Tensor& t, bool may_be_bytes = false) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::Bool:
    case ScalarType::Byte:
      if (may_be_bytes) return Dtype::kByte;
      [[fallthrough]];
    default: STD_TORCH_CHECK(false, "x: this dtype cannot be shaped; float16, bfloat16, float32 and float64 can");
  }
  return Dtype::kByte;
}

void check_x(const Tensor& x) {
  STD_TORCH_CHECK(is_dense(x), "x must be dense in memory (contiguous or channels_last)");
}

const uint8_t* checked_bits(const Tensor& bits, int64_t n) {
  STD_TORCH_CHECK(bits.is_cpu() && bits.scalar_type() == ScalarType::Byte && bits.is_contiguous() && bits.numel() == bytes_for(n),
                  "bits must be a contiguous uint8 CPU tensor of ", bytes_for(n), " bytes for ", n, " elements");
  return static_cast<const uint8_t*>(bits.const_data_ptr());
}

Mask random_mask(const Tensor& rng_state, double p_zero) {
  STD_TORCH_CHECK(rng_state.is_cpu() && rng_state.scalar_type() == ScalarType::Long && rng_state.is_contiguous() && rng_state.numel() == 2,
                  "rng_state must be a contiguous int64 CPU tensor [seed, offset]");
  STD_TORCH_CHECK(p_zero >= 0 && p_zero < 1, "p_zero must be in [0, 1), not ", p_zero);
  const int64_t* state = static_cast<const int64_t*>(rng_state.const_data_ptr());
  return Mask::random(static_cast<uint64_t>(state[0]), static_cast<uint64_t>(state[1]), p_zero);
}

Mask mask_of(const std::optional<Tensor>& rng_state, const std::optional<Tensor>& bits, double p_zero, int64_t n) {
  STD_TORCH_CHECK(!(rng_state && bits), "a mask is random (rng_state) or given (bits), not both");
  if (rng_state) return random_mask(*rng_state, p_zero);
  if (bits) return Mask::packed(checked_bits(*bits, n));
  return {};
}

Tensor new_bytes(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count}, ScalarType::Byte);
}

// An uninitialized tensor like x. A large one is memory the system has just mapped, and its first touch costs more than
// shaping does; in 2 MiB pages that is a third. A hint: where the system knows none, nothing happens.
Tensor new_output(const Tensor& x) {
  Tensor y = torch::stable::empty_like(x);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kWorthwhile = 4 << 20;
  const uintptr_t bytes = static_cast<uintptr_t>(y.numel()) * y.element_size();
  if (bytes >= kWorthwhile) {
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const uintptr_t first = reinterpret_cast<uintptr_t>(y.mutable_data_ptr());
    const uintptr_t start = (first + page - 1) / page * page, end = (first + bytes) / page * page;
    madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
  }
#endif
  return y;
}

// Shapes x into y (which may be x) and, where asked, the bits of M * 1[abs(x) <= 1] into `within_one`.
void run_shape(const Tensor& x, Tensor& y, Tensor* within_one, const std::optional<Tensor>& rng_state,
               const std::optional<Tensor>& bits, double p_zero, bool binarize) {
  check_x(x);
  Shape call{dtype_of(x), x.const_data_ptr(), nullptr, nullptr, x.numel(), mask_of(rng_state, bits, p_zero, x.numel()), binarize};
  call.y = y.mutable_data_ptr();
  if (within_one) call.within_one = static_cast<uint8_t*>(within_one->mutable_data_ptr());
  const Kernels& k = kernels();
  over_ranges(call.n, [&](Range range) { k.shape(call, range); });
}

Tensor shape(Tensor x, std::optional<Tensor> rng_state, std::optional<Tensor> bits, double p_zero, bool binarize) {
  Tensor y = new_output(x);
  run_shape(x, y, nullptr, rng_state, bits, p_zero, binarize);
  return y;
}

void shape_(Tensor x, std::optional<Tensor> rng_state, std::optional<Tensor> bits, double p_zero, bool binarize) {
  run_shape(x, x, nullptr, rng_state, bits, p_zero, binarize);
}

std::tuple<Tensor, Tensor> shape_clipped(Tensor x, std::optional<Tensor> rng_state, std::optional<Tensor> bits, double p_zero,
                                         bool binarize) {
  Tensor y = new_output(x), within_one = new_bytes(x, bytes_for(x.numel()));
  run_shape(x, y, &within_one, rng_state, bits, p_zero, binarize);
  return {y, within_one};
}

Tensor shape_clipped_(Tensor x, std::optional<Tensor> rng_state, std::optional<Tensor> bits, double p_zero, bool binarize) {
  Tensor within_one = new_bytes(x, bytes_for(x.numel()));
  run_shape(x, x, &within_one, rng_state, bits, p_zero, binarize);
  return within_one;
}

Tensor pack(Tensor x) {
  check_x(x);
  const int64_t n = x.numel();
  Tensor bits = new_bytes(x, bytes_for(n));
  const Dtype dtype = dtype_of(x, /*may_be_bytes=*/true);
  const void* from = x.const_data_ptr();
  uint8_t* to = static_cast<uint8_t*>(bits.mutable_data_ptr());
  const Kernels& k = kernels();
  over_ranges(n, [&](Range range) { k.pack(dtype, from, to, n, range); });
  return bits;
}

Tensor pack_random(Tensor rng_state, int64_t n, double p_zero) {
  STD_TORCH_CHECK(n >= 0, "n must not be negative, not ", n);
  const Mask mask = random_mask(rng_state, p_zero);
  Tensor bits = new_bytes(rng_state, bytes_for(n));
  uint8_t* to = static_cast<uint8_t*>(bits.mutable_data_ptr());
  const Kernels& k = kernels();
  over_ranges(n, [&](Range range) { k.pack_random(mask, to, n, range); });
  return bits;
}

Tensor unpack(Tensor bits, int64_t n) {
  STD_TORCH_CHECK(n >= 0, "n must not be negative, not ", n);
  const uint8_t* from = checked_bits(bits, n);
  Tensor out = torch::stable::new_empty(bits, {n}, ScalarType::Bool);
  uint8_t* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  const Kernels& k = kernels();
  over_ranges(n, [&](Range range) { k.unpack(from, to, n, range); });
  return out;
}

}  // namespace

// What STABLE_TORCH_LIBRARY_IMPL does, but when asked and not when the file is loaded: the tests of the primitives load it
// also where another backend was chosen.
void register_ops() {
  static TorchLibraryHandle library = nullptr;
  if (library) return;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_library_init_impl("fastshape", "CPU", __FILE__, __LINE__, &library));
  const auto impl = [](const char* name, void (*kernel)(StableIValue*, uint64_t, uint64_t)) {
    STABLE_TORCH_ERROR_CODE_CHECK(torch_library_impl(library, name, kernel, TORCH_ABI_VERSION));
  };
  impl("shape", TORCH_BOX(&shape));
  impl("shape_", TORCH_BOX(&shape_));
  impl("shape_clipped", TORCH_BOX(&shape_clipped));
  impl("shape_clipped_", TORCH_BOX(&shape_clipped_));
  impl("pack", TORCH_BOX(&pack));
  impl("pack_random", TORCH_BOX(&pack_random));
  impl("unpack", TORCH_BOX(&unpack));
}

}  // namespace fastshape::cpu
