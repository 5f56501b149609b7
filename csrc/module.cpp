// fastshape._C: registers the CPU kernels with torch and exposes the primitives to the tests.
#include <pybind11/pybind11.h>

#include "cpu/glue.h"
#include "cpu/kernels.h"
#include "fastshape_sources.h"  // written by setup.py

namespace py = pybind11;

namespace {

py::tuple philox_words(uint64_t seed, uint64_t offset) {
  const fastshape::PhiloxWords words = fastshape::philox(seed, offset);
  return py::make_tuple(words.word[0], words.word[1], words.word[2], words.word[3]);
}

py::bytes random_bits(uint64_t seed, uint64_t offset, int64_t n, double p_zero, int64_t chunk_bytes) {
  if (n < 0 || chunk_bytes < 1) throw py::value_error("n must be >= 0 and chunk_bytes >= 1");
  std::string bits(static_cast<size_t>(fastshape::bytes_for(n)), '\0');
  const int64_t state[] = {static_cast<int64_t>(seed), static_cast<int64_t>(offset)};
  const fastshape::Mask mask = fastshape::MaskRequest::random(state, p_zero).read();
  const auto size = static_cast<int64_t>(bits.size());
  for (int64_t first = 0; first < size; first += chunk_bytes)
    fastshape::cpu::kernels().pack_random(mask, reinterpret_cast<uint8_t*>(bits.data()), n, {first, std::min(size, first + chunk_bytes)});
  return bits;
}

py::bytes pack_bools(const py::bytes& values) {
  const std::string_view view = values;
  const auto n = static_cast<int64_t>(view.size());
  std::string bits(static_cast<size_t>(fastshape::bytes_for(n)), '\0');
  fastshape::cpu::kernels().pack(fastshape::cpu::Dtype::kByte, view.data(), reinterpret_cast<uint8_t*>(bits.data()), n,
                                 {0, static_cast<int64_t>(bits.size())});
  return bits;
}

std::string limit_simd(const std::string& simd) {
  const char* in_use = fastshape::cpu::limit_simd(simd);
  if (!in_use) throw py::value_error("simd='" + simd + "': allowed are plain, avx2, avx512");
  return in_use;
}

py::dict build_facts() {
  py::dict facts;
  facts["compiler"] = __VERSION__;
  facts["torch_abi_target"] = FASTSHAPE_TORCH_ABI_TARGET;
  facts["built_with_torch"] = FASTSHAPE_BUILT_WITH_TORCH;
  facts["sources"] = FASTSHAPE_SOURCES;
  facts["simd"] = fastshape::cpu::kernels().simd;
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of fastshape, and their primitives for tests.";
  m.def("register_ops", &fastshape::cpu::register_ops, "Register the CPU kernels of the fastshape ops with torch.");
  m.def("philox_words", &philox_words, py::arg("seed"), py::arg("offset"), "The four 32-bit Philox4x32-10 words of one counter.");
  m.def("random_bits", &random_bits, py::arg("seed"), py::arg("offset"), py::arg("n"), py::arg("p_zero"), py::arg("chunk_bytes"),
        "Packed random mask of n elements, computed chunk_bytes mask bytes at a time.");
  m.def("pack_bools", &pack_bools, py::arg("values"), "Packed bits of a string of bytes, one element per byte.");
  m.def("limit_simd", &limit_simd, py::arg("simd"), "Use no instruction set above plain, avx2 or avx512; returns the one now in use.");
  m.def("build_facts", &build_facts, "What this file was built with.");
}
