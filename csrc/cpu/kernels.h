// CPU kernels on raw pointers. Every function works on a range of mask bytes of a tensor of n elements. The owner of a byte
// also owns its eight elements, so that any number of threads can share the ranges without a race. A range of `pack_top` is a
// whole number of groups of rows (`rows_in_group`).
#pragma once

#include <cstdint>
#include <string>

#include "fastshape/arguments.h"
#include "fastshape/dispatch.h"
#include "fastshape/mask.h"

namespace fastshape::cpu {

using fastshape::Dtype;

// Mask bytes [first, last).
struct Range {
  int64_t first, last;
};

struct Kernels {
  const char* simd;
  void (*shape)(const ShapeArguments&, const Mask&, Range);                            // y = B(x) * M or x * M
  void (*ones)(const OnesArguments&, const Mask&, Range);                              // bits of B(x) * M
  void (*pack)(Dtype, const void* x, uint8_t* bits, int64_t n, Range);                 // bits of x > 0
  void (*pack_random)(const Mask&, uint8_t* bits, int64_t n, Range);                   // bits of a random mask
  void (*pack_top)(const TopArguments&, Range);                                        // bits of each row's largest elements
  void (*unpack)(const uint8_t* bits, uint8_t* out, int64_t n, Range);                 // 0 or 1, one byte per element
};

const Kernels& plain_kernels();
// Null where the processor or the compiler lacks these instructions.
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

// The kernels in use: the fastest that this processor can run, unless limit_simd() lowers that.
const Kernels& kernels();

// For tests: from now on, uses no instruction set above `simd` ("plain", "avx2", "avx512"). Returns the one now in use, or null
// for an unknown name.
const char* limit_simd(const std::string& simd);

}  // namespace fastshape::cpu
