// What gpt2fast._C lends to the bindings of C++ kernels: its declarations, its choice of instruction set, its memory. A
// library of another package does not link against _C. Instead Python hands this struct to the library after loading it
// (gpt2fast.build.connect). _C itself uses the same struct in the same way.
#pragma once
#include <c10/core/impl/alloc_cpu.h>

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/dispatch.h"
#include "declaration.h"

namespace gpt2fast {

// Returns why a kernel does not cover a call, or null if it does. `first` is the first tensor whose dtype is the
// call's.
using Objection = const char* (*)(const Tensor& first);

// Any change in the meaning of a function below, or in Value, needs a new version.
constexpr int32_t kJointVersion = 1;

struct Joint {
  int32_t version = kJointVersion, size = sizeof(Joint);
  const Declaration& (*declaration_of)(const char* op);  // by "namespace::name"
  bool (*fits)(const Declaration& declared, const Value* arguments);
  const Tensor* (*first_floating)(const Declaration& declared, const Value* arguments);
  void (*note)(const char* op, Objection objection);  // what backends.choose asks about the op
  const char* (*isa)();                               // the instruction set in use
  Tensor (*empty_output)(at::IntArrayRef sizes, ScalarType dtype);
};

// One for each library. It is hidden; otherwise the dynamic linker would merge those of several libraries into one.
struct __attribute__((visibility("hidden"))) Connection {
  const Joint* joint = nullptr;
  std::vector<std::pair<const char*, Objection>> unnoted;  // bindings that were registered before connect

  static Connection& here() {
    static auto* connection = new Connection;
    return *connection;
  }

  void connect(const Joint* lent) {
    joint = lent;
    for (auto [op, objection] : std::exchange(unnoted, {})) joint->note(op, objection);
  }

  void note(const char* op, Objection objection) {
    if (joint)
      joint->note(op, objection);
    else
      unnoted.emplace_back(op, objection);
  }
};

// What _C lends. It may be called only after connect.
inline const Joint& joint() { return *Connection::here().joint; }

// The same as at::empty for a contiguous CPU tensor, but large outputs come from gpt2fast's own memory (memory.h).
inline Tensor empty_output(at::IntArrayRef sizes, ScalarType dtype) { return joint().empty_output(sizes, dtype); }

}  // namespace gpt2fast

// gpt2fast.build defines GPT2FAST_EXTENSION for the library of another package: the version of gpt2fast that the
// library is built against.
#ifdef GPT2FAST_EXTENSION
#define GPT2FAST_TEXT_OF(x) #x
#define GPT2FAST_TEXT(x) GPT2FAST_TEXT_OF(x)

// Connects this library to a joint of the same version. Returns null, or a text that says how the two differ.
extern "C" __attribute__((weak, used, visibility("default"))) const char* gpt2fast_connect(
    const gpt2fast::Joint* joint) {
  static std::string misfit;
  if (joint->version == gpt2fast::kJointVersion && joint->size == int32_t(sizeof(gpt2fast::Joint))) {
    gpt2fast::Connection::here().connect(joint);
    return nullptr;
  }
  auto words = [](int32_t version, size_t size) {
    return "joint " + std::to_string(version) + " of " + std::to_string(size) + " bytes";
  };
  misfit = GPT2FAST_TEXT(GPT2FAST_EXTENSION) " (" + words(gpt2fast::kJointVersion, sizeof(gpt2fast::Joint)) +
           "); there is " + words(joint->version, joint->size);
  return misfit.c_str();
}

namespace gpt2fast::cpu {

__attribute__((weak, visibility("hidden"))) Workspace& workspace() {
  static Workspace here{c10::alloc_cpu, c10::free_cpu};
  return here;
}

}  // namespace gpt2fast::cpu

#endif
