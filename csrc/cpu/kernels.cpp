#include "kernels.h"

namespace fastshape::cpu {
namespace {

const Kernels* best() {
  const Kernels* avx2 = avx2_kernels();
  return avx2 ? avx2 : &plain_kernels();
}

const Kernels* in_use = best();

}  // namespace

const Kernels& kernels() { return *in_use; }

const char* allow_simd(bool allowed) {
  in_use = allowed ? best() : &plain_kernels();
  return in_use->simd;
}

}  // namespace fastshape::cpu
