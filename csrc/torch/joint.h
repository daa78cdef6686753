// What gpt2fast._C lends to the bindings of kernels in C++: its declarations, its instruction set, its memory. A
// library of another package does not link against _C. Python hands this struct over once the library is loaded
// (gpt2fast.build.connect), and _C itself takes the same struct in the same way.
#pragma once
#include <c10/core/impl/alloc_cpu.h>

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/dispatch.h"
#include "declaration.h"

namespace gpt2fast {

// Why a kernel does not cover a call, by the first tensor whose dtype is the call's, or null.
using Objection = const char* (*)(const Tensor& first);

// Any change of what a function below means, or of Value, makes another version.
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

// Of this library alone: hidden, or the dynamic linker would make one of those of several libraries.
struct __attribute__((visibility("hidden"))) Connection {
  const Joint* joint = nullptr;
  std::vector<std::pair<const char*, Objection>> unnoted;  // bindings are registered before the joint is there

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

// What _C lends; only after connect.
inline const Joint& joint() { return *Connection::here().joint; }

// As at::empty, on the CPU, contiguous: large outputs come from gpt2fast's memory.
inline Tensor empty_output(at::IntArrayRef sizes, ScalarType dtype) { return joint().empty_output(sizes, dtype); }

}  // namespace gpt2fast

// In the library of another package, gpt2fast.build defines this as the version of gpt2fast that it is built against.
#ifdef GPT2FAST_EXTENSION
#define GPT2FAST_TEXT_OF(x) #x
#define GPT2FAST_TEXT(x) GPT2FAST_TEXT_OF(x)

// Takes the joint of a gpt2fast of this version. Answers null, or how this library does not fit it.
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
