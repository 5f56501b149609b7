// Turns the run-time facts of a call (dtype, mask source, binarize, ...) into template arguments.
#pragma once

#include <type_traits>

#include "fastshape/mask.h"
#include "fastshape/shaping.h"

namespace fastshape {

enum class Dtype { kFloat16, kBFloat16, kFloat32, kFloat64, kByte };

template <class F>
void with_bool(bool value, F&& f) {
  value ? f(std::true_type{}) : f(std::false_type{});
}

template <class F>
void with_float(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat16: return f(Float16{});
    case Dtype::kBFloat16: return f(BFloat16{});
    case Dtype::kFloat32: return f(Float32{});
    case Dtype::kFloat64: return f(Float64{});
    case Dtype::kByte: return;  // bytes cannot be shaped; the glue rejects them
  }
}

template <class F>
void with_number(Dtype dtype, F&& f) {
  dtype == Dtype::kByte ? f(Byte{}) : with_float(dtype, f);
}

template <class F>
void with_source(MaskSource source, F&& f) {
  using std::integral_constant;
  switch (source) {
    case MaskSource::kNone: return f(integral_constant<MaskSource, MaskSource::kNone>{});
    case MaskSource::kRandom: return f(integral_constant<MaskSource, MaskSource::kRandom>{});
    case MaskSource::kBits: return f(integral_constant<MaskSource, MaskSource::kBits>{});
  }
}

// Calls `body(number, binarize, keeps_within_one, source)`; each argument carries its value in its type.
template <class F>
void with_shape(Dtype dtype, bool binarize, bool keeps_within_one, MaskSource source, F&& body) {
  with_float(dtype, [&](auto number_type) {
    with_bool(binarize, [&](auto binarize_type) {
      with_bool(keeps_within_one, [&](auto within_one_type) {
        with_source(source, [&](auto source_type) { body(number_type, binarize_type, within_one_type, source_type); });
      });
    });
  });
}

}  // namespace fastshape
