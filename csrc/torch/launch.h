// What every binding needs: running a kernel's tasks on torch's threads, the way to the reference, rows of a tensor.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <string>

#include "../cpu/dispatch.h"
#include "check.h"

namespace gpt2fast {

template <class Args>
void launch(const cpu::Kernel<Args>& kernel, const Args& args) {
  at::parallel_for(0, kernel.tasks(args), 1, [&](int64_t begin, int64_t end) { kernel.run(args, begin, end); });
}

template <class Out, size_t... I>
Out to_tuple(const torch::jit::Stack& stack, std::index_sequence<I...>) {
  return Out(stack.at(I).toTensor()...);
}

// gpt2fast_fallback::name(args...), for what the kernel does not cover: Python's backends.choose decides what runs it.
template <class Out, class... In>
Out fall_back(const char* name, const In&... in) {
  auto op = c10::Dispatcher::singleton().findSchemaOrThrow((std::string("gpt2fast_fallback::") + name).c_str(), "");
  torch::jit::Stack stack;
  torch::jit::push(stack, in...);
  op.callBoxed(stack);
  if constexpr (std::is_same_v<Out, Tensor>) {
    return stack.at(0).toTensor();
  } else {
    return to_tuple<Out>(stack, std::make_index_sequence<std::tuple_size_v<Out>>());
  }
}

// x as rows of its last dimension at one stride, that dimension dense; a copy only where the strides do not allow it.
struct Rows {
  c10::MaybeOwned<Tensor> held;  // x itself, or the copy
  int64_t count, stride;
  const void* data;

  explicit Rows(const Tensor& x) : held(c10::MaybeOwned<Tensor>::borrowed(x)), count(1) {
    for (int64_t d = 0; d + 1 < x.dim(); ++d) count *= x.size(d);
    if (x.dim() && (x.stride(-1) == 1 || x.size(-1) <= 1) && collapses(x)) {
      stride = x.dim() > 1 ? outer_stride(x) : x.size(-1);
    } else {
      held = c10::MaybeOwned<Tensor>::owned(x.contiguous());
      stride = x.dim() ? x.size(-1) : 1;
    }
    data = held->const_data_ptr();
  }

 private:
  static int64_t outer_stride(const Tensor& x) {  // of the innermost leading dimension that is not 1
    for (int64_t d = x.dim() - 2; d >= 0; --d)
      if (x.size(d) != 1) return x.stride(d);
    return x.size(-1);
  }
  static bool collapses(const Tensor& x) {
    int64_t expected = -1;
    for (int64_t d = x.dim() - 2; d >= 0; --d) {
      if (x.size(d) == 1) continue;
      if (expected >= 0 && x.stride(d) != expected) return false;
      expected = x.stride(d) * x.size(d);
    }
    return true;
  }
};

inline const void* data(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

inline OptionalTensor contiguous(const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : t; }

}  // namespace gpt2fast
