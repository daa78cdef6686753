// Exports the kernel of another package for one instruction set. gpt2fast.build generates a source file for each set;
// it includes the set's Vec, vec_math.h, the package's NAME.h and this header.
#pragma once
#include "dispatch.h"

namespace gpt2fast::cpu {

template <class Args>
constexpr Kernel<Args> kernel_of(int64_t (*tasks)(const Args&), void (*run)(const Args&, int64_t, int64_t)) {
  return {tasks, run};
}

template <class Args>
Args args_of(int64_t (*tasks)(const Args&));

}  // namespace gpt2fast::cpu

// NAME_tasks and NAME_run may be in namespace gpt2fast, as our own are, or in the global namespace.
#define GPT2FAST_EXPORT_KERNEL(name, isa)                                       \
  namespace gpt2fast::cpu {                                                     \
  using name##_args = decltype(args_of(name##_tasks));                          \
  extern const Kernel<name##_args> name##_##isa;                                \
  const Kernel<name##_args> name##_##isa = kernel_of(name##_tasks, name##_run); \
  }
