// fastshape._C_cuda: registers the CUDA kernels with torch. It is a library of its own because it is linked with torch's CUDA
// libraries, and so cannot be loaded with a torch that has none.
#include <pybind11/pybind11.h>

#include "cuda/glue.h"
#include "fastshape_sources.h"  // written by setup.py

namespace py = pybind11;

namespace {

py::dict build_facts() {
  py::dict facts;
  facts["cuda"] = FASTSHAPE_CUDA_VERSION;
  facts["architectures"] = FASTSHAPE_CUDA_ARCHITECTURES;
  facts["torch_abi_target"] = FASTSHAPE_TORCH_ABI_TARGET;
  facts["built_with_torch"] = FASTSHAPE_BUILT_WITH_TORCH;
  facts["sources"] = FASTSHAPE_SOURCES;
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of fastshape.";
  m.def("register_ops", &fastshape::cuda::register_ops, "Register the CUDA kernels of the fastshape ops with torch.");
  m.def("build_facts", &build_facts, "What this file was built with.");
}
