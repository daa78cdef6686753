// The Python module gpt2fast._ptx: it parses PTX text, runs a launch, and returns what happened as dicts.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "results.h"

namespace py = pybind11;

namespace gpt2fast::ptx {
namespace {

using Dims = std::array<uint32_t, 3>;

py::object or_none(const std::string& s) { return s.empty() ? py::object(py::none()) : py::object(py::str(s)); }

// A kernel may have written parts of this text, so that it need not be valid UTF-8.
py::str text(const std::string& s) {
  return py::reinterpret_steal<py::str>(PyUnicode_DecodeUTF8(s.data(), py::ssize_t(s.size()), "replace"));
}

py::dict to_dict(const Launch& launch, const Error& e) {
  py::dict d;
  d["kind"] = e.kind;
  d["message"] = text(e.message);
  d["count"] = e.count;
  for (const char* unknown : {"line", "source", "other_source", "thread", "buffer"}) d[unknown] = py::none();
  d["instruction"] = "";
  if (e.pc != kNone) {
    const Instruction& i = launch.module.code[e.pc];
    d["line"] = i.line;
    d["source"] = or_none(launch.module.source_of(i));
    d["instruction"] = text(launch.module.text_of(i));
  }
  if (e.other_pc != kNone) d["other_source"] = or_none(launch.module.source_of(launch.module.code[e.other_pc]));
  if (e.has_thread) d["thread"] = py::tuple(py::cast(e.thread));
  d["block"] = py::tuple(py::cast(e.block));
  if (!e.buffer.empty()) d["buffer"] = e.buffer;
  if (e.has_address) d["address"] = e.address;
  if (e.has_offset) d["offset"] = e.offset;
  return d;
}

// Takes (address, bytes, name, initialised). `initialised` is True, False, or an array with a byte for each byte of the
// buffer, which the launch reads and updates.
Buffer to_buffer(const py::handle& given, std::vector<py::buffer_info>& held) {
  auto tuple = given.cast<py::tuple>();
  if (tuple.size() != 4)
    throw py::value_error("a buffer is (address, bytes, name, initialised), got " + std::string(py::str(given)));
  Buffer b;
  b.address = tuple[0].cast<uint64_t>();
  b.bytes = tuple[1].cast<uint64_t>();
  b.name = tuple[2].cast<std::string>();
  if (py::isinstance<py::bool_>(tuple[3])) {
    if (tuple[3].cast<bool>()) return b;
    b.own_written.assign(b.bytes, 0);
    return b;
  }
  py::buffer_info info = tuple[3].cast<py::buffer>().request(true);
  if (uint64_t(info.size) * uint64_t(info.itemsize) != b.bytes)
    throw py::value_error("buffer '" + b.name + "': initialised has " + std::to_string(info.size * info.itemsize) +
                          " bytes, the buffer " + std::to_string(b.bytes));
  b.written = static_cast<uint8_t*>(info.ptr);
  held.push_back(std::move(info));
  return b;
}

py::dict launch(const Module& module, const std::string& kernel, const Dims& grid, const Dims& block,
                uint32_t dynamic_shared, const std::string& params, const py::iterable& buffers, uint64_t budget,
                bool memcheck, bool racecheck, bool same_value_races) {
  LaunchConfig config;
  config.grid = grid;
  config.block = block;
  config.dynamic_shared = dynamic_shared;
  config.params.assign(params.begin(), params.end());
  std::vector<py::buffer_info> held;
  for (py::handle b : buffers) config.buffers.push_back(to_buffer(b, held));
  config.budget = budget;
  config.memcheck = memcheck;
  config.racecheck = racecheck;
  config.same_value_races = same_value_races;
  Launch launch(module, kernel, std::move(config));
  {
    py::gil_scoped_release released;
    launch.run();
  }
  py::dict result;
  py::list errors;
  for (const Error& e : launch.errors) errors.append(to_dict(launch, e));
  py::list notes;
  for (const Error& e : launch.notes) notes.append(to_dict(launch, e));
  result["errors"] = errors;
  result["notes"] = notes;
  result["error_count"] = launch.error_count;
  result["counters"] = counters(launch);
  result["per_source"] = counters_per_source(launch);
  result["per_buffer"] = counters_per_buffer(launch);
  result["printed"] = text(launch.output);
  return result;
}

py::list params(const Module& module, const std::string& kernel) {
  py::list all;
  for (const Parameter& p : module.kernel(kernel).params) {
    py::dict d;
    d["name"] = p.name;
    d["type"] = name_of(p.type);
    d["bytes"] = p.bytes;
    d["align"] = p.align;
    d["offset"] = p.offset;
    all.append(d);
  }
  return all;
}

py::dict variables(const Module& module) {
  py::dict all;
  for (const auto& v : module.variables) {
    py::dict d;
    d["address"] = v->address();
    d["bytes"] = v->bytes;
    d["space"] = name_of(v->space);
    d["alignment"] = v->align;
    all[py::str(v->name)] = d;
  }
  return all;
}

std::vector<std::string> kernels(const Module& module) {
  std::vector<std::string> names;
  for (const auto& [name, index] : module.kernels) names.push_back(name);
  return names;
}

}  // namespace
}  // namespace gpt2fast::ptx

PYBIND11_MODULE(_ptx, m) {
  using namespace gpt2fast::ptx;
  m.doc() = "Runs PTX on the CPU; gpt2fast.testing.ptx is what to use.";
  py::class_<Module>(m, "Module")
      .def(py::init<std::string>(), py::arg("text"))
      .def_property_readonly("kernels", &kernels)
      .def_property_readonly("variables", &variables)
      .def("params", &params, py::arg("kernel"))
      .def(
          "shared_bytes", [](const Module& module, const std::string& k) { return module.kernel(k).shared_bytes; },
          py::arg("kernel"))
      .def("launch", &launch, py::arg("kernel"), py::arg("grid"), py::arg("block"), py::arg("dynamic_shared"),
           py::arg("params"), py::arg("buffers"), py::arg("budget"), py::arg("memcheck") = true,
           py::arg("racecheck") = true, py::arg("same_value_races") = false);
}
