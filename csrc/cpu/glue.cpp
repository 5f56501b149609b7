// The CPU kernels as torch ops.
#include "glue.h"

#include "batch_norm.h"
#include "fastshape/order.h"
#include "kernels.h"
#include "registration.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fastshape::cpu {
namespace {

// 32768 elements, the grain size of torch's own elementwise ops.
constexpr int64_t kGrainBytes = 4096;

template <class F>
void over_ranges(int64_t n, const F& f) {
  torch::stable::parallel_for(0, bytes_for(n), kGrainBytes, [&](int64_t first, int64_t last) { f(Range{first, last}); });
}

struct Backend {
  static constexpr const char* kKey = "CPU";
  const Kernels& k = kernels();
  const BatchNormKernels& b = batch_norm_kernels();

  explicit Backend(const Tensor&) {}

  static bool owns(const Tensor& t) { return t.is_cpu(); }

  // The memory of a large tensor is freshly mapped, and touching it for the first time costs more than shaping does. Pages of
  // 2 MiB reduce that to a third. This is only a hint: a system without such pages ignores it.
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
    const Mask mask = call.mask.read();
    over_ranges(call.n, [&](Range range) { k.shape(call, mask, range); });
  }

  void pack(Dtype dtype, const void* x, uint8_t* bits, int64_t n) const {
    over_ranges(n, [&](Range range) { k.pack(dtype, x, bits, n, range); });
  }

  void pack_random(const MaskRequest& request, uint8_t* bits, int64_t n) const {
    const Mask mask = request.read();
    over_ranges(n, [&](Range range) { k.pack_random(mask, bits, n, range); });
  }

  void pack_top(const TopArguments& call) const {
    const int64_t group = rows_in_group(call.row), group_bytes = group * call.row / 8;
    const int64_t groups = (call.n / call.row + group - 1) / group, grain = std::max<int64_t>(1, kGrainBytes / group_bytes);
    torch::stable::parallel_for(0, groups, grain, [&](int64_t first, int64_t last) {
      k.pack_top(call, {group_bytes * first, std::min(group_bytes * last, bytes_for(call.n))});
    });
  }

  void unpack(const uint8_t* bits, uint8_t* out, int64_t n) const {
    over_ranges(n, [&](Range range) { k.unpack(bits, out, n, range); });
  }

  // ---- BatchNorm ----

  void ones(const OnesArguments& call) const {
    const Mask mask = call.mask.read();
    over_ranges(call.n, [&](Range range) { k.ones(call, mask, range); });
  }

  void count(const uint8_t* ones, int64_t n, const Channels& channels, int64_t* counts) const {
    constexpr int64_t kGroup = 32;  // channels that stay on one thread
    torch::stable::parallel_for(0, (channels.count + kGroup - 1) / kGroup, 1, [&](int64_t first, int64_t last) {
      b.count(ones, n, channels, counts, {kGroup * first, std::min(kGroup * last, channels.count)});
    });
  }

  void normalize(const BatchNorm& norm, Dtype dtype, const int64_t* counts, int64_t n, const Channels& channels,
                 double* statistics, void* table) const {
    const int64_t elements = n / channels.count;
    with_float(dtype, [&](auto number) {
      using Number = decltype(number);
      for (int64_t c = 0; c < channels.count; ++c)
        normalize_channel<Number>(norm, norm.batch_statistics ? counts[c] : 0, elements, c, channels.count, statistics,
                                  static_cast<typename Number::Bits*>(table));
    });
  }

  void look_up(const LookUpArguments& call) const {
    over_ranges(call.n, [&](Range range) { b.look_up(call, range); });
  }

  static int64_t partials(int64_t n, const Channels& channels) { return sum_partials(n, channels); }

  void sums(Dtype dtype, const void* grad, const uint8_t* ones, int64_t n, const Channels& channels, double* partials) const {
    const Sums call{dtype, grad, ones, n, channels, partials};
    torch::stable::parallel_for(0, sum_units(n, channels), 1, [&](int64_t first, int64_t last) { b.sums(call, {first, last}); });
  }

  void differentiate(const BatchNorm& norm, Dtype dtype, const double* statistics, const double* partials, int64_t parts,
                     int64_t n, const Channels& channels, void* grad_weight, void* grad_bias, void* coefficients) const {
    const int64_t count = channels.count;
    with_float(dtype, [&](auto number) {
      using Number = decltype(number);
      auto* to = static_cast<typename Value<Number>::Accumulator*>(coefficients);
      for (int64_t c = 0; c < count; ++c) {
        double sum[2] = {0, 0}, weight = 0, bias = 0;
        for (int64_t part = 0; part < parts; ++part)
          for (int a = 0; a < 2; ++a) sum[a] += partials[(2 * part + a) * count + c];
        const auto result = differentiate_channel<Number>(norm, statistics, sum, n / count, c, count, &weight, &bias);
        if (grad_weight) store_number(norm.parameter_dtype, grad_weight, c, weight);
        if (grad_bias) store_number(norm.parameter_dtype, grad_bias, c, bias);
        for (int a = 0; a < 2; ++a) {
          to[a * count + c] = result.scale[a];
          to[(2 + a) * count + c] = result.shift[a];
        }
      }
    });
  }

  void grad_input(const GradInputArguments& call) const {
    const Mask mask = call.mask.read();
    over_ranges(call.n, [&](Range range) { b.grad_input(call, mask, range); });
  }
};

}  // namespace

void register_ops() { register_backend<Backend>(); }

}  // namespace fastshape::cpu
