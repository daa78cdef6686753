// The way from PyTorch's dispatcher to an op's function in C++. The call is compared with the op's declaration, and the
// kernel's coverage is asked; if both agree, the function runs. Any other call goes to Python, which raises the error
// or chooses another implementation.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include "coverage.h"
#include "joint.h"
#include "launch.h"
#include "tensors.h"

namespace gpt2fast {

template <class Out, size_t... I>
Out to_tuple(const torch::jit::Stack& stack, std::index_sequence<I...>) {
  return Out(stack.at(I).toTensor()...);
}

template <class T>
const T& boxable(const T& value) {
  return value;
}
inline std::string boxable(std::string_view text) { return std::string(text); }

// Calls namespace_fallback::name(args...). Behind it, backends.run checks the call again and decides what runs it.
template <class Out, class... In>
Out fall_back(const char* fallback, const In&... in) {
  auto op = c10::Dispatcher::singleton().findSchemaOrThrow(fallback, "");
  torch::jit::Stack stack;
  torch::jit::push(stack, boxable(in)...);
  op.callBoxed(stack);
  if constexpr (std::is_void_v<Out>) {
    return;
  } else if constexpr (std::is_same_v<Out, Tensor>) {
    return stack.at(0).toTensor();
  } else {
    return to_tuple<Out>(stack, std::make_index_sequence<std::tuple_size_v<Out>>());
  }
}

template <auto kRun>
struct Binding;

template <class Out, class... In, Out (*kRun)(In...)>
struct Binding<kRun> {
  // "namespace::name" and "namespace_fallback::name". They are constant-initialised, so that no static constructor
  // overwrites what bind() has set.
  static inline const char *name = nullptr, *fallback = nullptr;
  static inline Objection objection = nullptr;

  // Python's check refuses the same calls and raises. If it let the call through, the call would come back here: then
  // the two checks disagree.
  static Out refused(In... in) {
    static thread_local bool again = false;
    TORCH_INTERNAL_ASSERT(!again, name, ": the checks of Python and C++ disagree");
    again = true;
    struct Reset {
      ~Reset() { again = false; }
    } reset;
    return fall_back<Out>(fallback, in...);
  }

  static const Declaration& declaration() {
    TORCH_CHECK(
        Connection::here().joint, name, ": the library of its kernel is not connected to gpt2fast; load it by ",
        "gpt2fast.build.load_extension(\"package._C\"), or call gpt2fast.build.connect(library) after its import");
    return joint().declaration_of(name);
  }

  static Out call(In... in) {
    static const Declaration& declared = declaration();
    const Value arguments[] = {value(in)...};
    if (!joint().fits(declared, arguments)) return refused(in...);
    const Tensor* first = joint().first_floating(declared, arguments);
    if (first && objection(*first)) return fall_back<Out>(fallback, in...);
    return kRun(in...);
  }
};

inline const char* lasting(const std::string& text) { return (new std::string(text))->c_str(); }

// Registers kRun for CPU tensors. kRun takes the op's arguments, allocates the outputs and launches the kernel.
template <auto kRun>
void bind(torch::Library& library, const char* name, Objection objection = uncovered_dtype) {
  c10::OperatorName op = library._resolve(name);
  Binding<kRun>::name = lasting(op.name);
  Binding<kRun>::fallback = lasting(std::string(*op.getNamespace()) + "_fallback::" + name);
  Binding<kRun>::objection = objection;
  Connection::here().note(Binding<kRun>::name, objection);
  library.impl(name, &Binding<kRun>::call);
}

}  // namespace gpt2fast
