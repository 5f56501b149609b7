// One pass over a map. It serves every op that turns an element and its bits into an element, into bits or into both.
#pragma once

#include "fastshape/mask.h"
#include "launch.cuh"
#include "tile.cuh"

namespace fastshape::cuda {

// The tiles of n elements. The first tiles are processed in steps: several at a time, in full vectors. The others are plain
// tiles: one at a time, element by element, with bounds checks. Without alignment all tiles are plain.
struct Work {
  int64_t n;
  int64_t steps;
  int64_t first_plain;  // the first plain tile
  int64_t tiles;

  int64_t units() const { return steps + (tiles - first_plain); }
};

// A tile that is processed element by element. The last one may be incomplete.
struct PlainTile {
  using T = Tile<1>;
  unsigned elements;  // in this tile
  unsigned lane;

  __device__ PlainTile(int64_t n, int64_t tile, unsigned lane) : lane(lane) {
    const int64_t left = n - tile * kTileElements;
    elements = left < kTileElements ? static_cast<unsigned>(left) : static_cast<unsigned>(kTileElements);
  }
  __device__ bool has(unsigned access) const { return access * kLanes + lane < elements; }
  __device__ bool has_owned_byte() const { return 8 * T::owned_byte(lane) < elements; }
};

// What a pass does with the elements. Each op derives from this struct, redefines the members that differ, and defines:
//
//   template <int kCount> uint32_t apply(Bits* element, Place place, uint32_t bits) const
//     Processes kCount consecutive elements in place. Bit k of `bits` is the mask of element k, and bit 8 + k is its bit of
//     `ones`. Returns the bits to write, in the same layout: bits 0 to 7 go to `bits_out`, bits 8 to 15 to `more_bits_out`.
//
// `Place` is what the op needs to know about the position of the elements: place(element) computes it, and
// advance<kWidth>(place) moves it to the lane's next access, kLanes * kWidth elements further.
template <class BitsOfOne, MaskSource kMaskSource>
struct Op {
  using Bits = BitsOfOne;
  static constexpr MaskSource kSource = kMaskSource;
  static constexpr int kLoads = kLoadsInFlight, kPlainLoads = 8;  // vectors and elements that are loaded before the first is used
  static constexpr bool kReads = true, kWrites = true;                // reads x, writes y
  static constexpr bool kOnes = false;                                // reads `ones`
  static constexpr bool kWritesBits = false, kWritesMoreBits = false;  // writes bits_out, more_bits_out

  const void* x;
  void* y;
  const uint8_t* ones;
  uint8_t *bits_out, *more_bits_out;

  struct Place {};
  __device__ Place place(int64_t) const { return {}; }
  template <int kWidth>
  __device__ void advance(Place&) const {}
};

template <class Op>
struct Pass {
  using Bits = typename Op::Bits;
  static constexpr int kWidth = kVectorWidth<Bits>;
  static constexpr int kStep = std::max(1, Op::kLoads * kWidth / 8);  // tiles
  static constexpr bool kMasked = Op::kSource != MaskSource::kNone;

  Op op;
  Mask mask;
  int64_t n;
  unsigned lane;

  // The bits of eight elements that are read from memory.
  __device__ uint32_t load_bits(int64_t byte) const {
    uint32_t bits = Op::kSource == MaskSource::kBits ? mask.bits[byte] : 0u;
    if (Op::kOnes) bits |= static_cast<uint32_t>(op.ones[byte]) << 8;
    return bits;
  }

  __device__ void store_bits(int64_t byte, uint32_t bits) const {
    op.bits_out[byte] = static_cast<uint8_t>(bits);
    if (Op::kWritesMoreBits) op.more_bits_out[byte] = static_cast<uint8_t>(bits >> 8);
  }

  // kStep whole tiles. All loads are issued before the first is used.
  __device__ void vectors(int64_t tile) const {
    using T = Tile<kWidth>;
    using V = Vector<Bits>;
    const int64_t byte = tile * kTileBytes + T::owned_byte(lane);
    const int64_t first = tile * (kTileElements / kWidth) + lane;
    const V* from = static_cast<const V*>(op.x) + first;
    V* to = static_cast<V*>(op.y) + first;
    uint32_t bits[kStep];
    V v[kStep][T::kAccesses] = {};
#pragma unroll
    for (int t = 0; t < kStep; ++t) {
      bits[t] = load_bits(byte + t * kTileBytes);
#pragma unroll
      for (int a = 0; a < T::kAccesses; ++a)
        if (Op::kReads) v[t][a] = from[(t * T::kAccesses + a) * kLanes];
    }
    // The mask is drawn while the loads are in flight. The round keys are computed again for each step, because keeping them
    // would take 18 registers.
    if (Op::kSource == MaskSource::kRandom) {
      Mask draws = mask;
      from_here_on(draws.seed);
#pragma unroll
      for (int t = 0; t < kStep; ++t) bits[t] |= mask_byte<MaskSource::kRandom>(draws, byte + t * kTileBytes);
    }
    auto place = op.place(first * kWidth);
#pragma unroll
    for (int t = 0; t < kStep; ++t) {
      if (kMasked || Op::kOnes) from_here_on(bits[t]);
      uint32_t lane_bits = kMasked || Op::kOnes ? T::exchange(bits[t], lane) : 0u;
      if (!kMasked) lane_bits |= 0xFFu;
      uint32_t result = 0;
#pragma unroll
      for (int a = 0; a < T::kAccesses; ++a) {
        if (t + a > 0) op.template advance<kWidth>(place);
        // Without this the compiler loads the tables of all accesses at once and runs out of registers.
        if (Op::kOnes) __syncwarp();
        Elements<Bits> elements(v[t][a]);
        result |= op.template apply<kWidth>(elements.element, place, lane_bits >> (a * kWidth)) << (a * kWidth);
        if (Op::kWrites) to[(t * T::kAccesses + a) * kLanes] = elements.vector();
      }
      if (Op::kWritesBits) store_bits(byte + t * kTileBytes, T::exchange(result, lane));
    }
  }

  // One tile at any alignment.
  __device__ void plain(int64_t index) const {
    using T = PlainTile::T;
    const PlainTile tile(n, index, lane);
    const int64_t byte = index * kTileBytes + T::owned_byte(lane);
    const int64_t first = index * kTileElements + lane;
    const Bits* from = static_cast<const Bits*>(op.x) + first;
    Bits* to = static_cast<Bits*>(op.y) + first;
    uint32_t bits = 0;
    if (tile.has_owned_byte()) {
      bits = load_bits(byte);
      if (Op::kSource == MaskSource::kRandom) bits |= mask_byte<MaskSource::kRandom>(mask, byte);
      if (!kMasked) bits |= 0xFFu;
    }
    const uint32_t lane_bits = T::exchange(bits, lane);
    uint32_t result = 0;
    auto place = op.place(first);
#pragma unroll 1
    for (int start = 0; start < T::kAccesses; start += Op::kPlainLoads) {
      Bits element[Op::kPlainLoads] = {};
#pragma unroll
      for (int i = 0; i < Op::kPlainLoads; ++i)
        if (Op::kReads && tile.has(start + i)) element[i] = from[(start + i) * kLanes];
#pragma unroll
      for (int i = 0; i < Op::kPlainLoads; ++i) {
        const int a = start + i;
        if (tile.has(a)) {
          result |= op.template apply<1>(element + i, place, lane_bits >> a) << a;
          if (Op::kWrites) to[a * kLanes] = element[i];
        }
        op.template advance<1>(place);
      }
    }
    if (Op::kWritesBits) {
      const uint32_t owned = T::exchange(result, lane);
      if (tile.has_owned_byte()) store_bits(byte, owned);
    }
  }
};

// Processes this warp's share of the tiles. The plain tiles go to the last warps first, because these have no more steps than
// the others.
template <class Op>
__device__ __forceinline__ void over_map(const Op& op, const MaskRequest& mask, const Work& work) {
  using P = Pass<Op>;
  const P pass{op, mask.read(), work.n, lane_index()};
  const int64_t warp = warp_index(), warps = warp_count();
#pragma unroll 1
  for (int64_t step = warp; step < work.steps; step += warps) pass.vectors(step * P::kStep);
#pragma unroll 1
  for (int64_t tile = work.first_plain + (warps - 1 - warp); tile < work.tiles; tile += warps) pass.plain(tile);
}

// `aligned`: whether every map read or written starts at a multiple of 16 bytes.
template <class Op>
Work work_for(int64_t n, bool aligned) {
  constexpr int64_t kStep = Pass<Op>::kStep;
  const int64_t steps = aligned ? n / (kTileElements * kStep) : 0;
  return {n, steps, steps * kStep, divided_up(n, kTileElements)};
}

}  // namespace fastshape::cuda
