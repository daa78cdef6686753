// From the dispatcher to an op's function: the call is checked as declared, the kernel's coverage is asked, and the
// function runs. A call that does not fit or is not covered goes to Python, which words the error or chooses another
// way.
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

// namespace_fallback::name(args...), where backends.run checks the call anew and decides what runs it.
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
  // "namespace::name" and "namespace_fallback::name": constants, which static constructors do not undo.
  static inline const char *name = nullptr, *fallback = nullptr;
  static inline Objection objection = nullptr;

  // Python finds out the same and raises; were it to come back here, the two checks would disagree.
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

// Registers kRun, a function of the op's arguments that allocates the outputs and launches, for CPU tensors.
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
