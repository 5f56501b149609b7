// What one call of the shape ops works on.
#pragma once

#include <cstdint>

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

}  // namespace fastshape
