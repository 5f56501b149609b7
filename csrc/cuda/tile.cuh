// How a warp covers a tensor: in tiles of 32 mask bytes, one per lane. A tile has 256 elements.
//
// Memory accesses are fastest when the 32 lanes read 16 bytes each, side by side: 512 bytes in whole 32-byte sectors. Masks are
// simplest when each lane owns a whole byte: one Philox call makes eight decisions, and bytes are written without atomics. In
// 16-bit dtypes eight elements are 16 bytes, and one layout serves both. In float32 eight elements are 32 bytes. A lane that
// read its own eight would use only half of each sector per access. So a tile takes two accesses there, each lane gets a
// 16-byte piece per access, and neighbouring lanes exchange mask bits (`exchange`).
#pragma once

#include <cstdint>
#include <cstring>

#include "fastshape/mask.h"

namespace fastshape::cuda {

constexpr unsigned kLanes = 32;
constexpr int64_t kTileBytes = kLanes;  // mask bytes
constexpr int64_t kTileElements = 8 * kTileBytes;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// Elements per access: 16 bytes, but at most the eight elements of one mask byte.
template <class Bits>
constexpr int kVectorWidth = 16 / sizeof(Bits) < 8 ? 16 / sizeof(Bits) : 8;

// The data of one access. It stays in whole words until it is used, because 16-bit elements that are unpacked take one register
// each: twice as many.
template <class Bits>
struct alignas(sizeof(Bits) * kVectorWidth<Bits>) Vector {
  uint32_t word[sizeof(Bits) * kVectorWidth<Bits> / sizeof(uint32_t)];
};

// Keeps the compiler from using `word` before this point. Otherwise it unpacks every word as soon as it is loaded, and runs out
// of registers.
__device__ __forceinline__ void from_here_on(uint32_t& word) { asm volatile("" : "+r"(word)); }
__device__ __forceinline__ void from_here_on(uint64_t& word) { asm volatile("" : "+l"(word)); }

template <class Bits>
struct Elements {
  Bits element[kVectorWidth<Bits>];

  __device__ explicit Elements(Vector<Bits> vector) {
#pragma unroll
    for (uint32_t& word : vector.word) from_here_on(word);
    memcpy(element, vector.word, sizeof element);
  }
  __device__ Vector<Bits> vector() const {
    Vector<Bits> vector;
    memcpy(vector.word, element, sizeof element);
    return vector;
  }
};

// A warp's view of its tiles: kWidth elements per access, 8 / kWidth accesses per tile. In access a, lane l has kWidth elements
// of the tile, from number kWidth * (32 a + l) on.
template <int kWidth>
struct Tile {
  static constexpr int kAccesses = 8 / kWidth;

  // The mask byte that a lane owns. Its elements are in the kAccesses lanes of the lane's group.
  static __device__ unsigned owned_byte(unsigned lane) { return lane % kAccesses * (kLanes / kAccesses) + lane / kAccesses; }

  // Turns the byte that a lane owns into the bits of the elements that it has (bit a * kWidth + k belongs to element k of access
  // a), and back. This transposes kAccesses x kAccesses cells of kWidth bits. A second byte, in bits 8 to 15, is treated alike.
  // All lanes of the warp must call it.
  static __device__ uint32_t exchange(uint32_t bits, unsigned lane) {
    if (kAccesses == 1) return bits;
    constexpr uint32_t kCells = ((1u << kWidth) - 1u) * 0x0101u;
    const unsigned cell = lane % kAccesses * kWidth;
    uint32_t result = 0;
#pragma unroll
    for (int a = 0; a < kAccesses; ++a) {
      const uint32_t other = __shfl_sync(kAllLanes, bits, a, kAccesses);
      result |= (other >> cell & kCells) << (a * kWidth);
    }
    return result;
  }
};

}  // namespace fastshape::cuda
