// The order of numbers as integers, for selection by size.
#pragma once

#include "fastshape/shaping.h"

namespace fastshape {

// A signed integer with the order of torch's sort: NaN of any pattern is largest, and -0 equals +0. It is the pattern without
// its sign, negated for a negative number. The key of -inf is the lowest, and one less is a number of its type too.
template <class Number>
FASTSHAPE_FUNCTION typename Number::Bits order_key(typename Number::Bits x) {
  using Bits = typename Number::Bits;
  const Bits magnitude = x & kMagnitude<Bits>;
  const Bits signed_magnitude = x < 0 ? static_cast<Bits>(-magnitude) : magnitude;
  return magnitude > Number::kInfinity ? kMagnitude<Bits> : signed_magnitude;
}

template <class Number>
constexpr typename Number::Bits kLowestKey = -Number::kInfinity;

template <class Number>
constexpr typename Number::Bits kHighestKey = kMagnitude<typename Number::Bits>;

// Which elements of a row are kept: those with a key above `key`, and the first `ties` elements whose key equals it.
template <class Key>
struct Cut {
  Key key;
  int64_t ties;
};

// Rows in a group, the fewest whose bits fill whole bytes.
FASTSHAPE_FUNCTION constexpr int64_t rows_in_group(int64_t row) {
  return row % 8 == 0 ? 1 : row % 4 == 0 ? 2 : row % 2 == 0 ? 4 : 8;
}

}  // namespace fastshape
