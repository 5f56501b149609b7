// What one call of an op works on.
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

// A binary map, and what each channel's zeros and ones become.
struct LookUpArguments {
  Dtype dtype;  // of y and table
  const uint8_t* ones;
  int64_t n;
  Channels channels;
  const void* table;  // patterns of a zero, a number a channel, then those of a one
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
  // Numbers of the dtype's accumulator: scale of a zero, a number a channel; scale of a one; shift of a zero; of a one.
  const void* coefficients;
  void* dx;
};

}  // namespace fastshape
