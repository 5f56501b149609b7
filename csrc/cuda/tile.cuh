// How a warp lays itself over a tensor: in tiles of 32 mask bytes, one a lane, which are 256 elements.
//
// Memory wants the 32 lanes of one access side by side: 16 bytes each, 512 in all, whole 32-byte sectors. Masks want one
// lane to own a whole byte: one Philox call gives eight decisions, and bytes are written without atomics. Eight elements
// are 16 bytes in 16-bit dtypes, and both wishes are one. In float32 they are 32 bytes: a lane that read its own eight
// would leave every access with half of each sector, so the elements are dealt in 16-byte pieces instead, two accesses a
// tile, and neighbouring lanes exchange mask bits (`exchange`).
#pragma once

#include <cstdint>
#include <cstring>

#include "fastshape/mask.h"

namespace fastshape::cuda {

constexpr unsigned kLanes = 32;
constexpr int64_t kTileBytes = kLanes;  // mask bytes
constexpr int64_t kTileElements = 8 * kTileBytes;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// The elements one access moves: 16 bytes, but never more than the eight of one mask byte.
template <class Bits>
constexpr int kVectorWidth = 16 / sizeof(Bits) < 8 ? 16 / sizeof(Bits) : 8;

// What one access moves. It stays in whole words until its turn comes: elements of 16 bits taken apart take a register
// each, twice as many.
template <class Bits>
struct alignas(sizeof(Bits) * kVectorWidth<Bits>) Vector {
  uint32_t word[sizeof(Bits) * kVectorWidth<Bits> / sizeof(uint32_t)];
};

// Nothing computed from `word` is computed before this point, however early the word is there. Left to itself the compiler
// takes everything apart as soon as it is loaded, and runs out of registers.
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

// A warp's view of its tiles, `kWidth` elements an access, 8 / kWidth accesses a tile. Lane l meets, in access a, the
// elements kWidth * (32 a + l) and following of the tile.
template <int kWidth>
struct Tile {
  static constexpr int kAccesses = 8 / kWidth;

  // The mask byte of the tile that a lane owns. Its elements lie with the kAccesses lanes of the lane's own group.
  static __device__ unsigned owned_byte(unsigned lane) { return lane % kAccesses * (kLanes / kAccesses) + lane / kAccesses; }

  // Turns the byte a lane owns into the bits of the elements it meets (bit a * kWidth + k: element k of access a), and
  // back: a transposition of kAccesses x kAccesses cells of kWidth bits. The same of a second byte, in bits 8 to 15. All
  // lanes of the warp must come.
  static __device__ uint32_t exchange(uint32_t bits, unsigned lane) {
    if (kAccesses == 1) return bits;
    constexpr uint32_t kCells = ((1u << kWidth) - 1u) * 0x0101u;
    const unsigned cell = lane % kAccesses * kWidth;
    uint32_t exchanged = 0;
#pragma unroll
    for (int a = 0; a < kAccesses; ++a) {
      const uint32_t other = __shfl_sync(kAllLanes, bits, a, kAccesses);
      exchanged |= (other >> cell & kCells) << (a * kWidth);
    }
    return exchanged;
  }
};

}  // namespace fastshape::cuda
