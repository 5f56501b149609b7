#include "kernels.cuh"

#include <algorithm>

#include "tile.cuh"

namespace fastshape::cuda {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kWarps = kThreads / kLanes;  // a block
// Four blocks of 64 registers a thread fill a multiprocessor, with 64 bytes asked for by each of 1024 threads.
constexpr int kMinBlocks = 4;
// 16-byte loads a thread has in flight before it uses the first.
constexpr int kLoadsInFlight = 4;

// ---- who does what ----

// The tiles of n elements: first those taken `kStep` at a time in full vectors, then those taken one at a time, element
// by element, with a look at the end of the tensor: the tail, or all where a pointer is not aligned.
struct Work {
  int64_t n;
  int64_t steps;        // of full vectors
  int64_t first_plain;  // tile
  int64_t tiles;
};

__device__ unsigned lane_index() { return threadIdx.x % kLanes; }
__device__ int64_t warp_index() { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes; }
__device__ int64_t warp_count() { return static_cast<int64_t>(gridDim.x) * kWarps; }

// Calls `vectors(tile)` and `plain(tile)` for this warp's share. The plain tiles go to the last warps first: those have
// no more steps than the others.
template <int kStep, class Vectors, class Plain>
__device__ void over_tiles(const Work& work, const Vectors& vectors, const Plain& plain) {
  const int64_t warp = warp_index(), warps = warp_count();
#pragma unroll 1
  for (int64_t step = warp; step < work.steps; step += warps) vectors(step * kStep);
#pragma unroll 1
  for (int64_t tile = work.first_plain + (warps - 1 - warp); tile < work.tiles; tile += warps) plain(tile);
}

// A tile met element by element, perhaps cut short by the end of the tensor.
struct PlainTile {
  using T = Tile<1>;
  unsigned elements;  // it has
  unsigned lane;

  __device__ PlainTile(int64_t n, int64_t tile, unsigned lane) : lane(lane) {
    const int64_t left = n - tile * kTileElements;
    elements = left < kTileElements ? static_cast<unsigned>(left) : static_cast<unsigned>(kTileElements);
  }
  __device__ bool has(unsigned access) const { return access * kLanes + lane < elements; }
  __device__ bool has_owned_byte() const { return 8 * T::owned_byte(lane) < elements; }
};

// ---- shape ----

template <class Number, bool kBinarize, bool kWithinOne, MaskSource kSource>
struct ShapeBody {
  using Bits = typename Number::Bits;
  static constexpr int kWidth = kVectorWidth<Bits>;
  static constexpr int kStep = kLoadsInFlight * kWidth / 8;  // tiles

  const Bits* x;
  Bits* y;
  uint8_t* within_one;
  int64_t n;
  Mask mask;
  unsigned lane;

  // Shapes `kCount` elements in place; returns which of them are kept and within one.
  template <int kCount>
  static __device__ uint32_t shape_elements(Bits* element, uint32_t keep) {
    uint32_t within = 0;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const bool kept = keep >> k & 1;
      if (kWithinOne) within |= static_cast<uint32_t>(is_within_one<Number>(element[k])) << k;
      element[k] = shape_element<Number, kBinarize>(element[k], kept);
    }
    return within & keep;
  }

  // kStep whole tiles. Every load is asked for before the first is used.
  __device__ void vectors(int64_t tile) const {
    using T = Tile<kWidth>;
    using V = Vector<Bits>;
    const int64_t byte = tile * kTileBytes + T::owned_byte(lane);
    const int64_t first = tile * (kTileElements / kWidth) + lane;
    const V* from = reinterpret_cast<const V*>(x) + first;
    V* to = reinterpret_cast<V*>(y) + first;
    uint32_t bits[kStep];
    V v[kStep][T::kAccesses];
#pragma unroll
    for (int t = 0; t < kStep; ++t) {
      if (kSource == MaskSource::kBits) bits[t] = mask_byte<kSource>(mask, byte + t * kTileBytes);
#pragma unroll
      for (int a = 0; a < T::kAccesses; ++a) v[t][a] = from[(t * T::kAccesses + a) * kLanes];
    }
    // Drawn while the loads are under way. The round keys are worked out anew for each step: kept from one to the next,
    // they would take 18 registers.
    if (kSource == MaskSource::kRandom) {
      Mask draws = mask;
      from_here_on(draws.seed);
#pragma unroll
      for (int t = 0; t < kStep; ++t) bits[t] = mask_byte<kSource>(draws, byte + t * kTileBytes);
    }
#pragma unroll
    for (int t = 0; t < kStep; ++t) {
      if (kSource != MaskSource::kNone) from_here_on(bits[t]);
      const uint32_t keep = kSource == MaskSource::kNone ? 0xFFu : T::exchange(bits[t], lane);
      uint32_t kept_within = 0;
#pragma unroll
      for (int a = 0; a < T::kAccesses; ++a) {
        Elements<Bits> elements(v[t][a]);
        kept_within |= shape_elements<kWidth>(elements.element, keep >> (a * kWidth)) << (a * kWidth);
        to[(t * T::kAccesses + a) * kLanes] = elements.vector();
      }
      if (kWithinOne) within_one[byte + t * kTileBytes] = static_cast<uint8_t>(T::exchange(kept_within, lane));
    }
  }

  // One tile at any alignment.
  __device__ void plain(int64_t index) const {
    using T = PlainTile::T;
    const PlainTile tile(n, index, lane);
    const int64_t byte = index * kTileBytes + T::owned_byte(lane);
    const Bits* from = x + (index * kTileElements + lane);
    Bits* to = y + (index * kTileElements + lane);
    uint32_t bits = 0;
    if (tile.has_owned_byte()) bits = mask_byte<kSource>(mask, byte);
    Bits element[T::kAccesses];
#pragma unroll
    for (int a = 0; a < T::kAccesses; ++a) element[a] = tile.has(a) ? from[a * kLanes] : Bits{0};
    uint32_t keep = T::exchange(bits, lane);
#pragma unroll
    for (int a = 0; a < T::kAccesses; ++a)
      if (!tile.has(a)) keep &= ~(1u << a);
    const uint32_t kept_within = shape_elements<T::kAccesses>(element, keep);
#pragma unroll
    for (int a = 0; a < T::kAccesses; ++a)
      if (tile.has(a)) to[a * kLanes] = element[a];
    if (kWithinOne) {
      const uint32_t owned = T::exchange(kept_within, lane);
      if (tile.has_owned_byte()) within_one[byte] = static_cast<uint8_t>(owned);
    }
  }
};

template <class Number, bool kBinarize, bool kWithinOne, MaskSource kSource>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    shape_kernel(const void* x, void* y, uint8_t* within_one, const MaskRequest mask, const Work work) {
  using Body = ShapeBody<Number, kBinarize, kWithinOne, kSource>;
  using Bits = typename Number::Bits;
  const Body body{static_cast<const Bits*>(x), static_cast<Bits*>(y), within_one, work.n, mask.read(), lane_index()};
  over_tiles<Body::kStep>(
      work, [&](int64_t tile) { body.vectors(tile); }, [&](int64_t tile) { body.plain(tile); });
}

// ---- pack ----

template <class Number>
struct PackBody {
  using Bits = typename Number::Bits;
  static constexpr int kWidth = kVectorWidth<Bits>;
  static constexpr int kStep = kLoadsInFlight * kWidth / 8;

  const Bits* x;
  uint8_t* bits;
  int64_t n;
  unsigned lane;

  template <int kCount>
  static __device__ uint32_t positive(const Bits* element) {
    uint32_t found = 0;
#pragma unroll
    for (int k = 0; k < kCount; ++k) found |= static_cast<uint32_t>(is_positive<Number>(element[k])) << k;
    return found;
  }

  __device__ void vectors(int64_t tile) const {
    using T = Tile<kWidth>;
    using V = Vector<Bits>;
    const V* from = reinterpret_cast<const V*>(x) + (tile * (kTileElements / kWidth) + lane);
    V v[kStep][T::kAccesses];
#pragma unroll
    for (int t = 0; t < kStep; ++t)
#pragma unroll
      for (int a = 0; a < T::kAccesses; ++a) v[t][a] = from[(t * T::kAccesses + a) * kLanes];
#pragma unroll
    for (int t = 0; t < kStep; ++t) {
      uint32_t found = 0;
#pragma unroll
      for (int a = 0; a < T::kAccesses; ++a) found |= positive<kWidth>(Elements<Bits>(v[t][a]).element) << (a * kWidth);
      bits[(tile + t) * kTileBytes + T::owned_byte(lane)] = static_cast<uint8_t>(T::exchange(found, lane));
    }
  }

  __device__ void plain(int64_t index) const {
    using T = PlainTile::T;
    const PlainTile tile(n, index, lane);
    const Bits* from = x + (index * kTileElements + lane);
    Bits element[T::kAccesses];
#pragma unroll
    for (int a = 0; a < T::kAccesses; ++a) element[a] = tile.has(a) ? from[a * kLanes] : Bits{0};
    const uint32_t owned = T::exchange(positive<T::kAccesses>(element), lane);
    if (tile.has_owned_byte()) bits[index * kTileBytes + T::owned_byte(lane)] = static_cast<uint8_t>(owned);
  }
};

template <class Number>
__global__ void __launch_bounds__(kThreads, kMinBlocks) pack_kernel(const void* x, uint8_t* bits, const Work work) {
  using Body = PackBody<Number>;
  const Body body{static_cast<const typename Number::Bits*>(x), bits, work.n, lane_index()};
  over_tiles<Body::kStep>(
      work, [&](int64_t tile) { body.vectors(tile); }, [&](int64_t tile) { body.plain(tile); });
}

// ---- bits alone ----

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
      // Four bits to four bytes: the product has a copy of the bits at places 0, 7, 14 and 21, which do not meet.
      const Vector<uint8_t> v{{(packed & 0xFu) * 0x00204081u & 0x01010101u, (packed >> 4) * 0x00204081u & 0x01010101u}};
      reinterpret_cast<Vector<uint8_t>*>(out)[byte] = v;
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k)
        if (k < left) out[8 * byte + k] = packed >> k & 1;
    }
  });
}

// ---- launches ----

bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

Work work_for(int64_t n, bool aligned, int step_tiles) {
  const int64_t tiles = n / kTileElements + (n % kTileElements != 0);
  const int64_t steps = aligned ? n / (int64_t{kTileElements} * step_tiles) : 0;
  return {n, steps, steps * step_tiles, tiles};
}

int64_t divided_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Launches enough blocks for `units` of work, a warp or a thread each, but no more than the device holds kWaves times
// over; with more work than that, blocks go round again, all equally often.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t units, int64_t units_per_block, cudaStream_t stream,
                   Arguments... arguments) {
  constexpr int64_t kWaves = 4;
  if (units == 0) return cudaSuccess;
  int64_t blocks = divided_up(units, units_per_block);
  int device = 0, multiprocessors = 0, per_multiprocessor = 0;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device)) return error;
  if (blocks > multiprocessors) {
    if (cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, kThreads, 0))
      return error;
    const int64_t most = kWaves * multiprocessors * std::max(per_multiprocessor, 1);
    blocks = divided_up(blocks, divided_up(blocks, most));
  }
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace

cudaError_t shape(const ShapeArguments& call, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  with_shape(call.dtype, call.binarize, call.within_one != nullptr, call.mask.source,
             [&](auto number, auto binarize, auto within_one, auto source) {
               using Number = decltype(number);
               using Body = ShapeBody<Number, binarize.value, within_one.value, source.value>;
               const bool aligned = is_aligned(call.x, 16) && is_aligned(call.y, 16);
               const Work work = work_for(call.n, aligned, Body::kStep);
               const int64_t units = work.steps + (work.tiles - work.first_plain);
               error = launch(shape_kernel<Number, binarize.value, within_one.value, source.value>, units, kWarps, stream,
                              call.x, call.y, call.within_one, call.mask, work);
             });
  return error;
}

cudaError_t pack(Dtype dtype, const void* x, uint8_t* bits, int64_t n, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  with_number(dtype, [&](auto number) {
    using Number = decltype(number);
    const Work work = work_for(n, is_aligned(x, 16), PackBody<Number>::kStep);
    const int64_t units = work.steps + (work.tiles - work.first_plain);
    error = launch(pack_kernel<Number>, units, kWarps, stream, x, bits, work);
  });
  return error;
}

cudaError_t pack_random(const MaskRequest& mask, uint8_t* bits, int64_t n, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  with_source(mask.source, [&](auto source) {
    error = launch(pack_random_kernel<source.value>, bytes_for(n), kThreads, stream, mask, bits, n);
  });
  return error;
}

cudaError_t unpack(const uint8_t* bits, uint8_t* out, int64_t n, cudaStream_t stream) {
  const auto kernel = is_aligned(out, 8) ? unpack_kernel<true> : unpack_kernel<false>;
  return launch(kernel, bytes_for(n), kThreads, stream, bits, out, n);
}

}  // namespace fastshape::cuda
