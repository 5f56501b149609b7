// The kernels that every processor can run. They also serve the sums and gradients of float64 everywhere.
#include "batch_norm.h"

namespace fastshape::cpu {
namespace {

int ones_in(uint64_t word) {
  int ones = 0;
  for (; word; word &= word - 1) ++ones;
  return ones;
}

void count(const uint8_t* ones, int64_t n, const Channels& channels, int64_t* counts, Range range) {
  const BitReader reader{ones, bytes_for(n)};
  std::fill(counts + range.first, counts + range.last, 0);
  if (channels.inner == 1) {
    for (int64_t row = 0; row < n; row += channels.count)
      for (int64_t c = range.first; c < range.last; ++c) counts[c] += ones[(row + c) / 8] >> ((row + c) % 8) & 1;
    return;
  }
  for (int64_t image = 0; image < n; image += channels.count * channels.inner)
    for (int64_t c = range.first; c < range.last; ++c) {
      const int64_t first = image + c * channels.inner, last = first + channels.inner;
      for (int64_t i = first; i < last; i += 32) {
        const uint64_t here = last - i < 32 ? (1ull << (last - i)) - 1 : 0xFFFFFFFFull;
        counts[c] += ones_in(reader.from(i) & here);
      }
    }
}

void look_up(const LookUpArguments& call, Range range) {
  with_float(call.dtype, [&](auto number) {
    using Bits = typename decltype(number)::Bits;
    const Bits* table = static_cast<const Bits*>(call.table);
    Bits* y = static_cast<Bits*>(call.y);
    const bool planes = call.channels.inner != 1;
    over_stretches(call.channels, 8 * range.first, std::min(8 * range.last, call.n), [&](int64_t first, int64_t last, int64_t channel) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t one = call.ones[i / 8] >> (i % 8) & 1;
        y[i] = table[one * call.channels.count + channel + (planes ? 0 : i - first)];
      }
    });
  });
}

// Adds the elements of a plane to *sum0 and *sum1: float sums of at most 64 elements, which are added up in double.
template <class Number>
void sum_plane(const typename Number::Bits* grad, const uint8_t* ones, int64_t first, int64_t last, double* sum0, double* sum1) {
  using Accumulator = typename Value<Number>::Accumulator;
  for (int64_t block = first; block < last; block += 64) {
    Accumulator sum[2] = {0, 0};
    for (int64_t i = block; i < std::min(block + 64, last); ++i) sum[ones[i / 8] >> (i % 8) & 1] += Value<Number>::load(grad[i]);
    *sum0 += sum[0];
    *sum1 += sum[1];
  }
}

void sums(const Sums& call, Range range) {
  with_float(call.dtype, [&](auto number) {
    using Number = decltype(number);
    using Accumulator = typename Value<Number>::Accumulator;
    const auto* grad = static_cast<const typename Number::Bits*>(call.grad);
    const int64_t count = call.channels.count, inner = call.channels.inner;
    if (inner != 1) {
      std::fill(call.partials + range.first, call.partials + range.last, 0.0);
      std::fill(call.partials + count + range.first, call.partials + count + range.last, 0.0);
      for (int64_t image = 0; image < call.n; image += count * inner)
        for (int64_t c = range.first; c < range.last; ++c)
          sum_plane<Number>(grad, call.ones, image + c * inner, image + (c + 1) * inner, call.partials + c, call.partials + count + c);
      return;
    }
    const int64_t rows = call.n / count, each = rows_a_unit(call.channels);
    for (int64_t unit = range.first; unit < range.last; ++unit) {
      double* partial = call.partials + 2 * count * unit;
      std::fill(partial, partial + 2 * count, 0.0);
      const int64_t end = std::min(rows, (unit + 1) * each);
      for (int64_t block = unit * each; block < end; block += 64)
        for (int64_t c = 0; c < count; ++c) {
          Accumulator sum[2] = {0, 0};
          for (int64_t row = block; row < std::min(block + 64, end); ++row) {
            const int64_t i = row * count + c;
            sum[call.ones[i / 8] >> (i % 8) & 1] += Value<Number>::load(grad[i]);
          }
          partial[c] += sum[0];
          partial[count + c] += sum[1];
        }
    }
  });
}

void grad_input(const GradInputArguments& call, const Mask& mask, Range range) {
  MaskStrip strip;
  with_float(call.dtype, [&](auto number) {
    using Number = decltype(number);
    using Accumulator = typename Value<Number>::Accumulator;
    const auto* grad = static_cast<const typename Number::Bits*>(call.grad);
    auto* dx = static_cast<typename Number::Bits*>(call.dx);
    const auto* coefficients = static_cast<const Accumulator*>(call.coefficients);
    const int64_t count = call.channels.count;
    const bool planes = call.channels.inner != 1;
    for (int64_t byte = range.first; byte < range.last; byte += MaskStrip::kBytes) {
      const Range piece{byte, std::min(byte + MaskStrip::kBytes, range.last)};
      const uint8_t* keep = strip.read(mask, call.n, piece).bits;
      over_stretches(call.channels, 8 * piece.first, std::min(8 * piece.last, call.n), [&](int64_t first, int64_t last, int64_t channel) {
        for (int64_t i = first; i < last; ++i) {
          const int64_t one = call.ones[i / 8] >> (i % 8) & 1, c = channel + (planes ? 0 : i - first);
          const Accumulator value = grad_element(Value<Number>::load(grad[i]), coefficients[one * count + c], coefficients[(2 + one) * count + c]);
          dx[i] = keep[i / 8 - piece.first] >> (i % 8) & 1 ? Value<Number>::round(value) : typename Number::Bits{0};
        }
      });
    }
  });
}

}  // namespace

const BatchNormKernels& plain_batch_norm_kernels() {
  static const BatchNormKernels kernels = {count, look_up, sums, grad_input};
  return kernels;
}

}  // namespace fastshape::cpu
