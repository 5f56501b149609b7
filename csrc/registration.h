// Gives torch a backend's kernels.
#pragma once

#include "batch_norm_ops.h"
#include "ops.h"

namespace fastshape {

// What STABLE_TORCH_LIBRARY_IMPL does, but when asked and not when the file is loaded: the tests of the primitives load it
// also where another backend was chosen. Once; later calls do nothing.
template <class Backend>
void register_backend() {
  static TorchLibraryHandle library = nullptr;
  if (library) return;
  // The check of 2.10's headers: the STABLE_ one beside it is of a later torch, which one may be built with, but not all have.
  TORCH_ERROR_CODE_CHECK(aoti_torch_library_init_impl("fastshape", Backend::kKey, __FILE__, __LINE__, &library));
  const auto impl = [](const char* name, void (*kernel)(StableIValue*, uint64_t, uint64_t)) {
    TORCH_ERROR_CODE_CHECK(torch_library_impl(library, name, kernel, TORCH_ABI_VERSION));
  };
  Ops<Backend>::implement(impl);
  BatchNormOps<Backend>::implement(impl);
}

}  // namespace fastshape
