#pragma once

#include "fastshape/dispatch.h"
#include "kernels.h"

namespace fastshape::cpu {

// Calls `body(number, binarize, keeps_within_one, source)`; each argument carries its value in its type.
template <class F>
void with_shape(const ShapeArguments& call, const Mask& mask, F&& body) {
  fastshape::with_shape(call.dtype, call.binarize, call.within_one != nullptr, mask.source, body);
}

// Calls `body(number, keeps_within_one, source)`; each argument carries its value in its type.
template <class F>
void with_ones(const OnesArguments& call, const Mask& mask, F&& body) {
  with_float(call.dtype, [&](auto number) {
    with_bool(call.within_one != nullptr, [&](auto within_one) {
      with_source(mask.source, [&](auto source) { body(number, within_one, source); });
    });
  });
}

}  // namespace fastshape::cpu
