// The functions of gpt2fast._C that are not ops, bound by pybind11: the choice of the instruction set, coverage,
// declarations, memory, and helpers for benchmarks and tests.
#include <c10/core/impl/alloc_cpu.h>
#include <torch/extension.h>

#include "coverage.h"
#include "declare.h"
#include "decode_step.h"
#include "guard.h"
#include "joint.h"
#include "launch.h"
#include "memory.h"
#include "peak.h"

namespace {

std::vector<std::string> isas(bool runnable) {
  std::vector<std::string> names;
  for (const char* const* name = gpt2fast::cpu::compiled_isas(); *name; ++name)
    if (!runnable || gpt2fast::cpu::cpu_supports(*name)) names.push_back(*name);
  return names;
}

// A uint8 tensor of nbytes bytes, aligned to 2 MiB, in huge pages if the system has them.
at::Tensor huge_empty(int64_t nbytes) {
  TORCH_CHECK_VALUE(nbytes >= 0, "gpt2fast::huge_empty: nbytes must be at least 0, got ", nbytes);
  auto* block = new gpt2fast::HugeBlock(size_t(nbytes));
  return at::from_blob(block->data(), {nbytes}, [block](void*) { delete block; }, at::TensorOptions().dtype(at::kByte));
}

// For lists of tensors, all of one length: the addresses of the tensors, list by list, and then the sizes of those in
// the first list, as bytes of int64. None if a tensor is not contiguous. Python would take some 60 ns for each tensor,
// and an optimizer has hundreds.
py::object addresses(const std::vector<py::list>& lists) {
  std::vector<int64_t> found, sizes;
  for (const py::list& list : lists)
    for (const py::handle& item : list) {
      TORCH_CHECK_TYPE(THPVariable_Check(item.ptr()), "gpt2fast::addresses: lists must hold tensors");
      const at::Tensor& x = THPVariable_Unpack(item.ptr());
      if (!x.is_contiguous()) return py::none();
      found.push_back(reinterpret_cast<int64_t>(x.const_data_ptr()));
      if (&list == &lists[0]) sizes.push_back(x.numel());
    }
  found.insert(found.end(), sizes.begin(), sizes.end());
  return py::bytes(reinterpret_cast<const char*>(found.data()), found.size() * sizeof(int64_t));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  gpt2fast::Connection::here().connect(&gpt2fast::own_joint());
  m.def(
      "joint", [] { return reinterpret_cast<uintptr_t>(&gpt2fast::own_joint()); },
      "The address of what is lent to libraries of other packages: csrc/torch/joint.h");
  // With torch's allocator, an allocation that fails raises torch's error; the default one would throw a bare
  // bad_alloc.
  gpt2fast::cpu::workspace() = {c10::alloc_cpu, c10::free_cpu};
  m.def("cpu_isa", [] { return std::string(gpt2fast::cpu::table().isa); }, "The instruction set in use");
  m.def("set_cpu_isa", [](const std::string& isa) { gpt2fast::cpu::set_isa(isa.c_str()); });
  m.def("compiled_isas", [] { return isas(false); }, "Instruction sets in this binary, best first");
  m.def("runnable_isas", [] { return isas(true); }, "Those of them that this CPU has, best first");
  m.def(
      "cpu_objection",
      [](const std::string& op, const at::Tensor& first) -> std::optional<std::string> {
        auto found = gpt2fast::objections().find(op);
        const char* why = found == gpt2fast::objections().end() ? nullptr : found->second(first);
        return why ? std::optional<std::string>(why) : std::nullopt;
      },
      "Why the kernel of an op does not cover a call, by the call's first floating tensor, or None");
  m.def("declare", &gpt2fast::declare_rows, "What the kernels' bindings check: an op's tensors and values, as rows");
  m.def("set_recording_with_amx", [](bool value) { gpt2fast::recording_with_amx() = value; });
  m.def("huge_empty", &huge_empty);
  m.def(
      "release_memory", [] { return gpt2fast::OutputAllocator::instance().release(); },
      "Hands the memory of freed large outputs back to the system; the bytes that were kept");
  m.def("addresses", &addresses,
        "Of the tensors of lists, and the sizes of the first list's, as bytes of int64, or None");
  m.def("measure_peak", &gpt2fast::measure_peak, pybind11::arg("what"), pybind11::arg("x"),
        pybind11::arg("y") = py::none(), pybind11::arg("repeats") = 0);
  gpt2fast::bind_decode_step(m);
  m.def("guard_memory", &gpt2fast::guard_memory, "For tests: guard bytes around every CPU tensor");
}
