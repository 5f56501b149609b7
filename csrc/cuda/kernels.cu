#include "kernels.cuh"

#include "map.cuh"

namespace fastshape::cuda {
namespace {

// ---- shape ----

template <class Number, bool kBinarize, bool kWithinOne, MaskSource kSource>
struct ShapeOp : Op<typename Number::Bits, kSource> {
  using Bits = typename Number::Bits;
  static constexpr bool kWritesBits = kWithinOne;

  template <int kCount>
  __device__ uint32_t apply(Bits* element, typename ShapeOp::Place, uint32_t keep) const {
    uint32_t within = 0;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const bool kept = keep >> k & 1;
      if (kWithinOne) within |= static_cast<uint32_t>(is_within_one<Number>(element[k])) << k;
      element[k] = shape_element<Number, kBinarize>(element[k], kept);
    }
    return within & keep;
  }
};

template <class Number, bool kBinarize, bool kWithinOne, MaskSource kSource>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    shape_kernel(const void* x, void* y, uint8_t* within_one, const MaskRequest mask, const Work work) {
  over_map(ShapeOp<Number, kBinarize, kWithinOne, kSource>{{x, y, nullptr, within_one, nullptr}}, mask, work);
}

// ---- ones ----

// is_positive and is_within_one of eight 16-bit elements, two at a time, in half the instructions. The answer is the highest bit
// of each half after sums and differences that do not carry from one half of a word into the other.
template <class Number>
struct Halves {
  static constexpr uint32_t kBoth = 0x00010001u;
  uint32_t word[4];

  __device__ explicit Halves(const int16_t* element) { memcpy(word, element, sizeof word); }

  __device__ uint32_t positive() const {
    uint32_t flags[4];
    for (int k = 0; k < 4; ++k) {
      const uint32_t magnitude = word[k] & ~kTopOfHalves;
      const uint32_t not_zero = magnitude + 0x7FFFu * kBoth, nan = magnitude + (0x7FFFu - Number::kInfinity) * kBoth;
      flags[k] = not_zero & ~nan & ~word[k];
    }
    return gather_halves(flags);
  }
  __device__ uint32_t within_one() const {
    uint32_t flags[4];
    for (int k = 0; k < 4; ++k) flags[k] = (kTopOfHalves | Number::kOne * kBoth) - (word[k] & ~kTopOfHalves);
    return gather_halves(flags);
  }
};

template <class Number, bool kWithinOne, MaskSource kSource>
struct OnesOp : Op<typename Number::Bits, kSource> {
  using Bits = typename Number::Bits;
  static constexpr bool kWrites = false, kWritesBits = true, kWritesMoreBits = kWithinOne;

  template <int kCount>
  __device__ uint32_t apply(const Bits* element, typename OnesOp::Place, uint32_t keep) const {
    uint32_t ones = 0, within = 0;
    if constexpr (kCount == 8 && sizeof(Bits) == 2) {
      const Halves<Number> halves(element);
      ones = halves.positive();
      if (kWithinOne) within = halves.within_one();
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        ones |= static_cast<uint32_t>(is_positive<Number>(element[k])) << k;
        if (kWithinOne) within |= static_cast<uint32_t>(is_within_one<Number>(element[k])) << k;
      }
    }
    return (ones & keep) | (within & keep) << 8;
  }
};

template <class Number, bool kWithinOne, MaskSource kSource>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    ones_kernel(const void* x, uint8_t* ones, uint8_t* within_one, const MaskRequest mask, const Work work) {
  over_map(OnesOp<Number, kWithinOne, kSource>{{x, nullptr, nullptr, ones, within_one}}, mask, work);
}

// ---- bits only ----

template <class F>
__device__ void over_bytes(int64_t n, const F& f) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  for (int64_t byte = first; byte < bytes_for(n); byte += stride) f(byte);
}

template <MaskSource kSource>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    pack_random_kernel(const MaskRequest request, uint8_t* bits, int64_t n) {
  const Mask mask = request.read();
  over_bytes(n, [&](int64_t byte) { bits[byte] = mask_byte<kSource>(mask, byte) & tail_bits(n - 8 * byte); });
}

template <bool kAligned>
__global__ void __launch_bounds__(kThreads, kMinBlocks) unpack_kernel(const uint8_t* bits, uint8_t* out, int64_t n) {
  over_bytes(n, [&](int64_t byte) {
    const uint32_t packed = bits[byte];
    const int64_t left = n - 8 * byte;
    if (kAligned && left >= 8) {
      // Turns four bits into four bytes. The product has copies of the bits at positions 0, 7, 14 and 21, without overlap.
      const Vector<uint8_t> v{{(packed & 0xFu) * 0x00204081u & 0x01010101u, (packed >> 4) * 0x00204081u & 0x01010101u}};
      reinterpret_cast<Vector<uint8_t>*>(out)[byte] = v;
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k)
        if (k < left) out[8 * byte + k] = packed >> k & 1;
    }
  });
}

}  // namespace

cudaError_t shape(const ShapeArguments& call, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  with_shape(call.dtype, call.binarize, call.within_one != nullptr, call.mask.source,
             [&](auto number, auto binarize, auto within_one, auto source) {
               using Number = decltype(number);
               using ThisOp = ShapeOp<Number, binarize.value, within_one.value, source.value>;
               const Work work = work_for<ThisOp>(call.n, is_aligned(call.x, 16) && is_aligned(call.y, 16));
               error = launch(shape_kernel<Number, binarize.value, within_one.value, source.value>, kThreads, work.units(),
                              kWarps, stream, call.x, call.y, call.within_one, call.mask, work);
             });
  return error;
}

namespace {

template <class Number, bool kWithinOne, MaskSource kSource>
cudaError_t launch_ones(const OnesArguments& call, cudaStream_t stream) {
  const Work work = work_for<OnesOp<Number, kWithinOne, kSource>>(call.n, is_aligned(call.x, 16));
  return launch(ones_kernel<Number, kWithinOne, kSource>, kThreads, work.units(), kWarps, stream, call.x, call.ones,
                call.within_one, call.mask, work);
}

}  // namespace

cudaError_t ones(const OnesArguments& call, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  with_float(call.dtype, [&](auto number) {
    with_bool(call.within_one != nullptr, [&](auto within_one) {
      with_source(call.mask.source, [&](auto source) {
        error = launch_ones<decltype(number), within_one.value, source.value>(call, stream);
      });
    });
  });
  return error;
}

cudaError_t pack(Dtype dtype, const void* x, uint8_t* bits, int64_t n, cudaStream_t stream) {
  const OnesArguments call{dtype, x, bits, nullptr, n, {}};
  return dtype == Dtype::kByte ? launch_ones<Byte, false, MaskSource::kNone>(call, stream) : ones(call, stream);
}

cudaError_t pack_random(const MaskRequest& mask, uint8_t* bits, int64_t n, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  with_source(mask.source, [&](auto source) {
    error = launch(pack_random_kernel<source.value>, kThreads, bytes_for(n), kThreads, stream, mask, bits, n);
  });
  return error;
}

cudaError_t unpack(const uint8_t* bits, uint8_t* out, int64_t n, cudaStream_t stream) {
  const auto kernel = is_aligned(out, 8) ? unpack_kernel<true> : unpack_kernel<false>;
  return launch(kernel, kThreads, bytes_for(n), kThreads, stream, bits, out, n);
}

}  // namespace fastshape::cuda
