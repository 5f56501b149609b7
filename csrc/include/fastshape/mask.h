// Masks as bits: element i is bit i % 8 of byte i / 8, least significant first, in memory order.
#pragma once

#include <cmath>
#include <cstdint>

#include "fastshape/philox.h"

namespace fastshape {

FASTSHAPE_FUNCTION constexpr int64_t bytes_for(int64_t elements) {
  return elements / 8 + (elements % 8 != 0);
}

// The bits of a byte that belong to elements; in the last byte of a mask the others are zero.
FASTSHAPE_FUNCTION uint8_t tail_bits(int64_t elements_left) {
  return elements_left >= 8 ? uint8_t{0xFF} : static_cast<uint8_t>((1u << elements_left) - 1u);
}

// An element is kept if and only if its 16-bit draw is >= this threshold. 0 keeps all elements, 65536 keeps none. Ties
// round to even, as in Python's round().
inline uint32_t drop_threshold(double p_zero) {
  return static_cast<uint32_t>(std::nearbyint(p_zero * 65536.0));
}

constexpr uint32_t kTopOfHalves = 0x80008000u;

enum class MaskSource { kNone, kRandom, kBits };

// Where M comes from. kNone: all ones. kRandom: (seed, offset, threshold) with a threshold above 0. kBits: packed bits.
struct Mask {
  MaskSource source = MaskSource::kNone;
  const uint8_t* bits = nullptr;
  uint64_t seed = 0;
  uint64_t offset = 0;
  uint32_t threshold = 0;
};

// A mask before its state is read: [seed, offset] is still in the memory of the device that will draw. So the host does not
// wait for the device, and a captured graph reads the current state at each replay.
struct MaskRequest {
  MaskSource source = MaskSource::kNone;
  const uint8_t* bits = nullptr;
  const int64_t* rng_state = nullptr;
  uint32_t threshold = 0;

  static MaskRequest random(const int64_t* rng_state, double p_zero) {
    const uint32_t threshold = drop_threshold(p_zero);
    // No element can be dropped, so there is no need to draw.
    if (threshold == 0) return {};
    return {MaskSource::kRandom, nullptr, rng_state, threshold};
  }
  static MaskRequest packed(const uint8_t* bits) { return {MaskSource::kBits, bits, nullptr, 0}; }

  // Reads [seed, offset]; call it on the device that holds them.
  FASTSHAPE_FUNCTION Mask read() const {
    const bool draws = source == MaskSource::kRandom;
    const int64_t seed = draws ? rng_state[0] : 0, offset = draws ? rng_state[1] : 0;
    return {source, bits, static_cast<uint64_t>(seed), static_cast<uint64_t>(offset), threshold};
  }
};

// Gathers the highest bit of each 16-bit half of four words into a byte. The halves count from 0, low half first; half i
// goes to bit i.
FASTSHAPE_FUNCTION uint32_t gather_halves(const uint32_t (&word)[4]) {
  uint32_t bits = 0;
  for (int k = 0; k < 4; ++k) bits |= (word[k] & kTopOfHalves) >> (15 - 2 * k);
  return (bits | bits >> 15) & 0xFFu;
}

// One byte of a random mask: eight decisions from one Philox call. `byte_index` is i / 8; offset + byte_index wraps at 2^64.
// Both halves of a word are compared with the threshold at once. If the highest bit of a half differs from the threshold's,
// it decides. Otherwise the difference of the lower 15 bits decides: it leaves the highest bit set unless it is negative.
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
