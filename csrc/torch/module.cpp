// What is no op, by pybind11: the choice of the instruction set, strictness, huge-page memory.
#include <sys/mman.h>
#include <torch/extension.h>

#include "guard.h"
#include "launch.h"
#include "peak.h"

namespace {

std::vector<std::string> isas(bool runnable) {
  std::vector<std::string> names;
  for (const char* const* name = gpt2fast::cpu::compiled_isas(); *name; ++name)
    if (!runnable || gpt2fast::cpu::cpu_supports(*name)) names.push_back(*name);
  return names;
}

// A uint8 tensor of nbytes, 2 MiB-aligned, asked of the system in huge pages where it has them.
at::Tensor huge_empty(int64_t nbytes) {
  constexpr size_t kPage = size_t(2) << 20;
  TORCH_CHECK_VALUE(nbytes >= 0, "gpt2fast::huge_empty: nbytes must be at least 0, got ", nbytes);
  size_t size = (size_t(nbytes) + kPage - 1) / kPage * kPage;
  void* memory = nullptr;
  TORCH_CHECK(posix_memalign(&memory, kPage, size ? size : kPage) == 0, "gpt2fast::huge_empty: out of memory: ", nbytes,
              " bytes");
#ifdef MADV_HUGEPAGE
  madvise(memory, size, MADV_HUGEPAGE);
#endif
  return at::from_blob(memory, {nbytes}, [](void* p) { free(p); }, at::TensorOptions().dtype(at::kByte));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("cpu_isa", [] { return std::string(gpt2fast::cpu::table().isa); }, "The instruction set in use");
  m.def("set_cpu_isa", [](const std::string& isa) { gpt2fast::cpu::set_isa(isa.c_str()); });
  m.def("compiled_isas", [] { return isas(false); }, "Instruction sets in this binary, best first");
  m.def("runnable_isas", [] { return isas(true); }, "Those of them that this CPU has, best first");
  m.def("set_strict", [](bool value) { gpt2fast::strict() = value; });
  m.def("huge_empty", &huge_empty);
  m.def("measure_peak", &gpt2fast::measure_peak, pybind11::arg("what"), pybind11::arg("x"),
        pybind11::arg("y") = py::none(), pybind11::arg("repeats") = 0);
  m.def("guard_memory", &gpt2fast::guard_memory, "For tests: guard bytes around every CPU tensor");
}
