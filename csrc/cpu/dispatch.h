#pragma once

#include "fastshape/dispatch.h"
#include "kernels.h"

namespace fastshape::cpu {

// Calls `body(number, binarize, keeps_within_one, source)` with each as a type.
template <class F>
void with_shape(const Shape& call, F&& body) {
  fastshape::with_shape(call.dtype, call.binarize, call.within_one != nullptr, call.mask.source, body);
}

}  // namespace fastshape::cpu
