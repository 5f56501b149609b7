// The arguments of one call of a kernel.
#pragma once

#include <cstdint>

#include "fastshape/batch_norm.h"
#include "fastshape/dispatch.h"
#include "fastshape/mask.h"

namespace fastshape {

struct ShapeArguments {
  Dtype dtype;  // not kByte
  const void* x;
  void* y;              // may be x
  uint8_t* within_one;  // null, or receives the bits of M * 1[abs(x) <= 1]
  int64_t n;
  MaskRequest mask;
  bool binarize;
};

// The bits of B(x) * M.
struct OnesArguments {
  Dtype dtype;  // not kByte
  const void* x;
  uint8_t* ones;
  uint8_t* within_one;  // null, or receives the bits of M * 1[abs(x) <= 1]
  int64_t n;
  MaskRequest mask;
};

// The bits of the `count` largest elements of each row of `row` elements. NaN is largest, -0 equals +0, and of equal elements
// the first are taken.
struct TopArguments {
  Dtype dtype;  // not kByte
  const void* x;
  uint8_t* bits;
  int64_t n, row, count;
};

// Writes a normalized map: looks up what each channel's zeros and ones become.
struct LookUpArguments {
  Dtype dtype;  // of y and table
  const uint8_t* ones;
  int64_t n;
  Channels channels;
  const void* table;  // bit patterns: the value of a zero for every channel, then the value of a one for every channel
  void* y;
};

// dx = M (scale[a] dy + shift[a]).
struct GradInputArguments {
  Dtype dtype;  // of grad and dx
  const void* grad;
  const uint8_t* ones;
  int64_t n;
  Channels channels;
  MaskRequest mask;
  // Four vectors of the dtype's accumulator, one number per channel: scale[0], scale[1], shift[0], shift[1].
  const void* coefficients;
  void* dx;
};

}  // namespace fastshape
