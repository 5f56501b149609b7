// Registers a backend's kernels with torch.
#pragma once

#include "batch_norm_ops.h"
#include "ops.h"

namespace fastshape {

// Does what STABLE_TORCH_LIBRARY_IMPL does, but at the call and not when the library is loaded: the tests of the primitives
// load the library even where another backend serves the ops. Calls after the first do nothing.
template <class Backend>
void register_backend() {
  static TorchLibraryHandle library = nullptr;
  if (library) return;
  // This check exists in torch 2.10. The STABLE_ macro of later headers would need a later torch at run time.
  TORCH_ERROR_CODE_CHECK(aoti_torch_library_init_impl("fastshape", Backend::kKey, __FILE__, __LINE__, &library));
  const auto impl = [](const char* name, void (*kernel)(StableIValue*, uint64_t, uint64_t)) {
    TORCH_ERROR_CODE_CHECK(torch_library_impl(library, name, kernel, TORCH_ABI_VERSION));
  };
  Ops<Backend>::implement(impl);
  BatchNormOps<Backend>::implement(impl);
}

}  // namespace fastshape
