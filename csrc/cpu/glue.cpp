// The CPU kernels as torch ops.
#include "glue.h"

#include "kernels.h"
#include "ops.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fastshape::cpu {
namespace {

// 32768 elements: torch's own grain for elementwise work.
constexpr int64_t kGrainBytes = 4096;

template <class F>
void over_ranges(int64_t n, const F& f) {
  torch::stable::parallel_for(0, bytes_for(n), kGrainBytes, [&](int64_t first, int64_t last) { f(Range{first, last}); });
}

struct Backend {
  static constexpr const char* kKey = "CPU";
  const Kernels& k = kernels();

  explicit Backend(const Tensor&) {}

  static bool owns(const Tensor& t) { return t.is_cpu(); }

  // A large tensor is memory the system has just mapped, and its first touch costs more than shaping does; in 2 MiB pages
  // that is a third. A hint: where the system knows none, nothing happens.
  static Tensor new_output(const Tensor& x) {
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

  void shape(const ShapeArguments& call) const {
    const Shape shape{call.dtype, call.x, call.y, call.within_one, call.n, call.mask.read(), call.binarize};
    over_ranges(call.n, [&](Range range) { k.shape(shape, range); });
  }

  void pack(Dtype dtype, const void* x, uint8_t* bits, int64_t n) const {
    over_ranges(n, [&](Range range) { k.pack(dtype, x, bits, n, range); });
  }

  void pack_random(const MaskRequest& request, uint8_t* bits, int64_t n) const {
    const Mask mask = request.read();
    over_ranges(n, [&](Range range) { k.pack_random(mask, bits, n, range); });
  }

  void unpack(const uint8_t* bits, uint8_t* out, int64_t n) const {
    over_ranges(n, [&](Range range) { k.unpack(bits, out, n, range); });
  }
};

}  // namespace

void register_ops() { Ops<Backend>::register_all(); }

}  // namespace fastshape::cpu
