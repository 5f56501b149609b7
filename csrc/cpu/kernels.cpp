#include "kernels.h"

#include "batch_norm.h"

namespace fastshape::cpu {
namespace {

enum Level { kPlain, kAvx2, kAvx512 };

const Kernels* at(int level) {
  if (level == kAvx512) return avx512_kernels();
  return level == kAvx2 ? avx2_kernels() : &plain_kernels();
}

int best(int level) {
  while (!at(level)) --level;
  return level;
}

int in_use = best(kAvx512);

}  // namespace

const Kernels& kernels() { return *at(in_use); }

const BatchNormKernels& batch_norm_kernels() {
  const BatchNormKernels* avx2 = in_use >= kAvx2 ? avx2_batch_norm_kernels() : nullptr;
  return avx2 ? *avx2 : plain_batch_norm_kernels();
}

const char* limit_simd(const std::string& simd) {
  for (int level = kPlain; level <= kAvx512; ++level)
    if (simd == (level == kPlain ? "plain" : level == kAvx2 ? "avx2" : "avx512")) {
      in_use = best(level);
      return kernels().simd;
    }
  return nullptr;
}

}  // namespace fastshape::cpu
