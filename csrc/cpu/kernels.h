// CPU kernels on raw pointers. Every function works on a range of mask bytes of a tensor of n elements: whoever owns a
// byte owns its eight elements, so ranges can go to any number of threads without a race.
#pragma once

#include <cstdint>

#include "fastshape/dispatch.h"
#include "fastshape/mask.h"

namespace fastshape::cpu {

using fastshape::Dtype;

// Mask bytes [first, last).
struct Range {
  int64_t first, last;
};

struct Shape {
  Dtype dtype;  // not kByte
  const void* x;
  void* y;              // may be x
  uint8_t* within_one;  // null, or receives the bits of M * 1[abs(x) <= 1]
  int64_t n;
  Mask mask;
  bool binarize;
};

struct Kernels {
  const char* simd;
  void (*shape)(const Shape&, Range);                                                  // y = B(x) * M or x * M
  void (*pack)(Dtype, const void* x, uint8_t* bits, int64_t n, Range);                 // bits of x > 0
  void (*pack_random)(const Mask&, uint8_t* bits, int64_t n, Range);                   // bits of a random mask
  void (*unpack)(const uint8_t* bits, uint8_t* out, int64_t n, Range);                 // 0 or 1, a byte each
};

const Kernels& plain_kernels();
const Kernels* avx2_kernels();  // null where the processor, or the compiler, has no AVX2

// The kernels in use: the best this processor has, asked once.
const Kernels& kernels();

// For tests, which hold every path to the same answer. Returns the path now in use.
const char* allow_simd(bool allowed);

}  // namespace fastshape::cpu
