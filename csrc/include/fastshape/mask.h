// Masks as bits: element i is bit i % 8 of byte i / 8, least significant first, in memory order.
#pragma once

#include <cmath>
#include <cstdint>

#include "fastshape/philox.h"

namespace fastshape {

FASTSHAPE_FUNCTION constexpr int64_t bytes_for(int64_t elements) {
  return elements / 8 + (elements % 8 != 0);
}

// The last byte of n elements holds n % 8 of them; its other bits are zero.
FASTSHAPE_FUNCTION uint8_t tail_bits(int64_t elements_left) {
  return elements_left >= 8 ? uint8_t{0xFF} : static_cast<uint8_t>((1u << elements_left) - 1u);
}

// A 16-bit draw is kept iff it is >= this. 0 keeps all, 65536 keeps none. Ties round to even, as Python's round().
inline uint32_t drop_threshold(double p_zero) {
  return static_cast<uint32_t>(std::nearbyint(p_zero * 65536.0));
}

constexpr uint32_t kTopOfHalves = 0x80008000u;

enum class MaskSource { kNone, kRandom, kBits };

// Where M comes from. kNone: all ones. kRandom: (seed, offset, threshold), the threshold not 0. kBits: packed bits.
struct Mask {
  MaskSource source = MaskSource::kNone;
  const uint8_t* bits = nullptr;
  uint64_t seed = 0;
  uint64_t offset = 0;
  uint32_t threshold = 0;
};

// A mask as it is asked for: [seed, offset] still in the memory of the device that will draw, so that asking waits for
// nothing and a captured graph reads what stands there at each replay.
struct MaskRequest {
  MaskSource source = MaskSource::kNone;
  const uint8_t* bits = nullptr;
  const int64_t* rng_state = nullptr;
  uint32_t threshold = 0;

  static MaskRequest random(const int64_t* rng_state, double p_zero) {
    const uint32_t threshold = drop_threshold(p_zero);
    // Nothing can be dropped: no need to draw.
    if (threshold == 0) return {};
    return {MaskSource::kRandom, nullptr, rng_state, threshold};
  }
  static MaskRequest packed(const uint8_t* bits) { return {MaskSource::kBits, bits, nullptr, 0}; }

  // Reads [seed, offset], where their memory is.
  FASTSHAPE_FUNCTION Mask read() const {
    const bool draws = source == MaskSource::kRandom;
    const int64_t seed = draws ? rng_state[0] : 0, offset = draws ? rng_state[1] : 0;
    return {source, bits, static_cast<uint64_t>(seed), static_cast<uint64_t>(offset), threshold};
  }
};

// The highest bits of the two halves of four words, gathered to a byte: that of half i to bit i, low halves first.
FASTSHAPE_FUNCTION uint32_t gather_halves(const uint32_t (&word)[4]) {
  uint32_t found = 0;
  for (int k = 0; k < 4; ++k) found |= (word[k] & kTopOfHalves) >> (15 - 2 * k);
  return (found | found >> 15) & 0xFFu;
}

// Eight decisions from one Philox call: one byte of a random mask. `byte_index` is i / 8; the sum wraps at 2^64. Both
// halves of a word are compared at once: where their highest bits differ from the threshold's, by these, else by the
// difference of the rest, which leaves the highest bit set where it is not negative.
FASTSHAPE_FUNCTION uint8_t random_byte(const Mask& mask, int64_t byte_index) {
  if (mask.threshold > 0xFFFFu) return 0;
  const PhiloxWords draw = philox(mask.seed, mask.offset + static_cast<uint64_t>(byte_index));
  const uint32_t threshold = mask.threshold * 0x00010001u, below = ~threshold;
  uint32_t kept[4];
  for (int k = 0; k < 4; ++k) {
    const uint32_t word = draw.word[k], difference = (word | kTopOfHalves) - (threshold & ~kTopOfHalves);
    kept[k] = (word & below) | (difference & (word | below));
  }
  return static_cast<uint8_t>(gather_halves(kept));
}

template <MaskSource kSource>
FASTSHAPE_FUNCTION uint8_t mask_byte(const Mask& mask, int64_t byte_index) {
  if (kSource == MaskSource::kRandom) return random_byte(mask, byte_index);
  if (kSource == MaskSource::kBits) return mask.bits[byte_index];
  return 0xFF;
}

}  // namespace fastshape
