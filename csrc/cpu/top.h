// Selects the largest elements of each row and writes their bits. Plain C++ that compilers vectorize: each SIMD path inlines it
// into a function of its own instruction set.
//
// The `count`-th largest key of a row is found without a sort. A histogram of the highest bits of the keys says in which bin it
// is. The keys of that bin are copied and treated alike, until few are left; among these a binary search counts the keys above
// a middle.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>

#include "fastshape/order.h"
#include "kernels.h"

namespace fastshape::cpu {

constexpr int64_t kFewKeys = 512;   // the binary search takes over
constexpr int64_t kKeyBlock = 512;  // keys that are computed at a time
constexpr int64_t kKeyStep = 64;    // a whole number of vectors of every width
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;

template <class Number>
FASTSHAPE_INLINE void compute_keys(const typename Number::Bits* __restrict x, int64_t count,
                                   typename Number::Bits* __restrict keys) {
  for (int64_t i = 0; i < count; ++i) keys[i] = order_key<Number>(x[i]);
}

// The number of keys above `middle`, of at most kFewKeys + kKeyStep keys in whole steps. It fits even a 16-bit sum.
template <class Key>
FASTSHAPE_INLINE int64_t count_above(const Key* keys, int64_t count, Key middle) {
  Key above = 0;
  const int64_t whole = count & ~(kKeyStep - 1);
  for (int64_t i = 0; i < whole; ++i) above = static_cast<Key>(above + (keys[i] > middle));
  return above;
}

// The difference of two keys, the first of which is not the smaller.
template <class Key>
FASTSHAPE_INLINE std::make_unsigned_t<Key> distance(Key high, Key low) {
  using Unsigned = std::make_unsigned_t<Key>;
  return static_cast<Unsigned>(static_cast<Unsigned>(high) - static_cast<Unsigned>(low));
}

template <class Key>
FASTSHAPE_INLINE Key moved(Key key, std::make_unsigned_t<Key> by) {
  return static_cast<Key>(static_cast<std::make_unsigned_t<Key>>(key) + by);
}

// How far to shift distances below or equal to `most` so that they are numbers of bins.
template <class Unsigned>
FASTSHAPE_INLINE int digit_shift(Unsigned most) {
  int shift = 0;
  while (most >> shift >= kBins) ++shift;
  return shift;
}

template <class Number>
class TopOfRow {
 public:
  using Key = typename Number::Bits;
  using Unsigned = std::make_unsigned_t<Key>;

  FASTSHAPE_INLINE explicit TopOfRow(int64_t row) : row_(row), keys_(new Key[row + kKeyStep]) {}

  FASTSHAPE_INLINE Cut<Key> cut(const Key* x, int64_t count) {
    if (count == row_) return {kLowestKey<Number> - 1, 0};
    if (count == 0) return {kHighestKey<Number>, 0};
    Key low = kLowestKey<Number>, high = kHighestKey<Number>;
    int64_t left = row_;
    bool are_keys = row_ <= kFewKeys;
    if (are_keys) compute_keys<Number>(x, row_, keys_.get());
    while (true) {
      if (are_keys) {
        range_of(left, low, high);
        if (low == high) return {low, count};
        if (left <= kFewKeys) return search(left, count, low, high);
      }
      const int shift = digit_shift(distance(high, low));
      fill_histogram(are_keys ? keys_.get() : x, are_keys, left, low, shift);
      int bin = kBins;
      int64_t in_bin = 0, above = 0;
      while (true) {
        --bin;
        in_bin = static_cast<int64_t>(bins_[0][bin]) + bins_[1][bin];
        if (above + in_bin >= count) break;
        above += in_bin;
      }
      const Key first = moved(low, static_cast<Unsigned>(static_cast<Unsigned>(bin) << shift));
      count -= above;
      if (shift == 0) return {first, count};
      if (count == in_bin) return {static_cast<Key>(first - 1), 0};
      copy_bin(are_keys ? keys_.get() : x, are_keys, left, low, shift, bin);
      left = in_bin;
      are_keys = true;
    }
  }

  // Where in the row the part ends in which elements equal to the cut are kept.
  FASTSHAPE_INLINE int64_t end_of_ties(const Key* x, Cut<Key> cut) const {
    if (cut.ties == 0) return 0;
    for (int64_t first = 0;; first += kKeyBlock) {
      const int64_t size = std::min(kKeyBlock, row_ - first);
      int32_t equal = 0;
      for (int64_t i = 0; i < size; ++i) equal += order_key<Number>(x[first + i]) == cut.key;
      if (equal < cut.ties) {
        cut.ties -= equal;
        continue;
      }
      for (int64_t i = 0;; ++i) {
        cut.ties -= order_key<Number>(x[first + i]) == cut.key;
        if (cut.ties == 0) return first + i + 1;
      }
    }
  }

 private:
  // The least and the greatest of the first `left` keys. Fills the last step with the least, above which no search counts.
  FASTSHAPE_INLINE void range_of(int64_t left, Key& low, Key& high) {
    const Key* keys = keys_.get();
    Key least = keys[0], greatest = keys[0];
    for (int64_t i = 0; i < left; ++i) {
      least = keys[i] < least ? keys[i] : least;
      greatest = keys[i] > greatest ? keys[i] : greatest;
    }
    for (int64_t i = 0; i < kKeyStep; ++i) keys_[left + i] = least;
    low = least, high = greatest;
  }

  // `count` of `left` keys from `low` to `high` are to be kept, at least one and not all.
  FASTSHAPE_INLINE Cut<Key> search(int64_t left, int64_t count, Key low, Key high) const {
    int64_t above_high = 0;
    while (low < high) {
      const Key middle = moved(low, static_cast<Unsigned>(distance(high, low) / 2));
      const int64_t above = count_above(keys_.get(), left + kKeyStep - 1, middle);
      if (above == count) return {middle, 0};
      if (above < count) {
        high = middle, above_high = above;
      } else {
        low = static_cast<Key>(middle + 1);
      }
    }
    return {low, count - above_high};
  }

  // The keys of `size` elements. `from` has the keys themselves or the elements.
  FASTSHAPE_INLINE const Key* block_of_keys(const Key* from, bool are_keys, int64_t size) {
    if (are_keys) return from;
    compute_keys<Number>(from, size, block_);
    return block_;
  }

  // Equal keys come in runs, as zeros do after a ReLU. Two histograms in turn save half of the wait for the last sum of a bin.
  FASTSHAPE_INLINE void fill_histogram(const Key* from, bool are_keys, int64_t count, Key low, int shift) {
    std::memset(bins_, 0, sizeof bins_);
    for (int64_t first = 0; first < count; first += kKeyBlock) {
      const int64_t size = std::min(kKeyBlock, count - first);
      const Key* keys = block_of_keys(from + first, are_keys, size);
      int64_t i = 0;
      for (; i + 1 < size; i += 2) {
        ++bins_[0][distance(keys[i], low) >> shift];
        ++bins_[1][distance(keys[i + 1], low) >> shift];
      }
      if (i < size) ++bins_[0][distance(keys[i], low) >> shift];
    }
  }

  FASTSHAPE_INLINE void copy_bin(const Key* from, bool are_keys, int64_t count, Key low, int shift, int bin) {
    int64_t copied = 0;
    for (int64_t first = 0; first < count; first += kKeyBlock) {
      const int64_t size = std::min(kKeyBlock, count - first);
      const Key* keys = block_of_keys(from + first, are_keys, size);
      for (int64_t i = 0; i < size; ++i) {
        const Key key = keys[i];
        keys_[copied] = key;
        copied += static_cast<int64_t>(distance(key, low) >> shift) == bin;
      }
    }
  }

  int64_t row_;
  std::unique_ptr<Key[]> keys_;
  alignas(64) Key block_[kKeyBlock];
  alignas(64) uint32_t bins_[2][kBins];
};

// Packs flags of consecutive elements.
class FlagPacker {
 public:
  FASTSHAPE_INLINE explicit FlagPacker(uint8_t* bits) : bits_(bits) {}

  // Adds the flags of elements whose key is above `limit`.
  template <class Number>
  FASTSHAPE_INLINE void add(const typename Number::Bits* __restrict x, int64_t count, typename Number::Bits limit) {
    while (count > 0) {
      const int64_t size = std::min(count, kKeyBlock - filled_);
      uint8_t* __restrict to = flags_ + filled_;
      for (int64_t i = 0; i < size; ++i) to[i] = order_key<Number>(x[i]) > limit;
      filled_ += size, x += size, count -= size;
      if (filled_ == kKeyBlock) write();
    }
  }

  // Writes what was added. Spare bits of the last byte are 0.
  FASTSHAPE_INLINE void write() {
    std::memset(flags_ + filled_, 0, 8);
    const int64_t bytes = bytes_for(filled_);
    for (int64_t byte = 0; byte < bytes; ++byte) {
      uint64_t eight;
      std::memcpy(&eight, flags_ + 8 * byte, sizeof eight);
      // The product moves flag k, the lowest bit of byte k, to bit 56 + k.
      bits_[byte] = static_cast<uint8_t>(eight * kGather >> 56);
    }
    bits_ += bytes, filled_ = 0;
  }

 private:
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  static constexpr uint64_t kGather = 0x8040201008040201;
#else
  static constexpr uint64_t kGather = 0x0102040810204080;
#endif
  uint8_t* bits_;
  int64_t filled_ = 0;
  alignas(64) uint8_t flags_[kKeyBlock + 8];
};

// The range begins and ends with a group of rows.
template <class Number>
FASTSHAPE_INLINE void pack_top_of(const TopArguments& call, Range range) {
  using Key = typename Number::Bits;
  const Key* x = static_cast<const Key*>(call.x);
  const int64_t end = std::min(8 * range.last, call.n);
  TopOfRow<Number> top(call.row);
  FlagPacker packer(call.bits + range.first);
  for (int64_t first = 8 * range.first; first < end; first += call.row) {
    const Cut<Key> cut = top.cut(x + first, call.count);
    const int64_t ties = top.end_of_ties(x + first, cut);
    packer.template add<Number>(x + first, ties, static_cast<Key>(cut.key - 1));
    packer.template add<Number>(x + first + ties, call.row - ties, cut.key);
  }
  packer.write();
}

}  // namespace fastshape::cpu
