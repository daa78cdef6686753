// From the dispatcher to an op's function: the call is checked as declared, the kernel's coverage is asked, and the
// function runs. A call that does not fit or is not covered goes to Python, which words the error or chooses another
// way.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include "coverage.h"
#include "launch.h"
#include "memory.h"
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

// gpt2fast_fallback::name(args...), where backends.run checks the call anew and decides what runs it.
template <class Out, class... In>
Out fall_back(const char* name, const In&... in) {
  auto op = c10::Dispatcher::singleton().findSchemaOrThrow((std::string("gpt2fast_fallback::") + name).c_str(), "");
  torch::jit::Stack stack;
  torch::jit::push(stack, boxable(in)...);
  op.callBoxed(stack);
  if constexpr (std::is_same_v<Out, Tensor>) {
    return stack.at(0).toTensor();
  } else {
    return to_tuple<Out>(stack, std::make_index_sequence<std::tuple_size_v<Out>>());
  }
}

template <auto kRun>
struct Binding;

template <class Out, class... In, Out (*kRun)(In...)>
struct Binding<kRun> {
  static inline const char* name = nullptr;  // constants, which static constructors do not undo
  static inline Objection objection = nullptr;

  // Python finds out the same and raises; were it to come back here, the two checks would disagree.
  static Out refused(In... in) {
    static thread_local bool again = false;
    TORCH_INTERNAL_ASSERT(!again, "gpt2fast::", name, ": the checks of Python and C++ disagree");
    again = true;
    struct Reset {
      ~Reset() { again = false; }
    } reset;
    return fall_back<Out>(name, in...);
  }

  static Out call(In... in) {
    static const Declaration& declared = declaration_of(std::string("gpt2fast::") + name);
    const Value arguments[] = {value(in)...};
    if (!declared.fits(arguments)) return refused(in...);
    if (objection(declared.first_floating(arguments))) return fall_back<Out>(name, in...);
    return kRun(in...);
  }
};

// Registers kRun, a function of the op's arguments that allocates the outputs and launches, for CPU tensors.
template <auto kRun>
void bind(torch::Library& library, const char* name, Objection objection = uncovered_dtype) {
  Binding<kRun>::name = name;
  Binding<kRun>::objection = objection;
  objections()[name] = objection;
  library.impl(name, &Binding<kRun>::call);
}

}  // namespace gpt2fast
