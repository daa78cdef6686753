// Runs a kernel: its tasks run on torch's threads.
#pragma once
#include <ATen/Parallel.h>

#include "../cpu/dispatch.h"
#include "joint.h"

namespace gpt2fast {

template <class Args>
void run_tasks(const cpu::Kernel<Args>& kernel, const Args& args) {
  at::parallel_for(0, kernel.tasks(args), 1, [&](int64_t begin, int64_t end) { kernel.run(args, begin, end); });
}

template <class Args>
void launch(cpu::Kernel<Args> cpu::Table::* entry, const std::type_identity_t<Args>& args) {
  run_tasks(cpu::table().*entry, args);
}

// A kernel of another package, compiled once for each instruction set.
template <class Args>
struct KernelSet {
  struct Entry {
    const char* isa;
    const cpu::Kernel<Args>* kernel;
  };
  std::vector<Entry> entries;
};

template <class Args>
void launch(const KernelSet<Args>& kernels, const std::type_identity_t<Args>& args) {
  const char* isa = joint().isa();
  for (const auto& entry : kernels.entries)
    if (!std::strcmp(entry.isa, isa)) return run_tasks(*entry.kernel, args);
  TORCH_CHECK(false, "gpt2fast: a library has no kernel for CPU ISA ", isa, ": build it again");
}

}  // namespace gpt2fast

#define GPT2FAST_KERNEL_EXTERN(isa, name, Args) extern const Kernel<Args> name##_##isa;
#define GPT2FAST_KERNEL_ENTRY(isa, name, Args) {#isa, &cpu::name##_##isa},

// GPT2FAST_CPU_KERNEL(scale, ScaleArgs), written outside of all namespaces, declares the kernel of scale.h, which
// gpt2fast.build has compiled. gpt2fast::launch(gpt2fast::scale, args) then runs it.
#define GPT2FAST_CPU_KERNEL(name, Args)                                                      \
  namespace gpt2fast {                                                                       \
  namespace cpu {                                                                            \
  GPT2FAST_EACH_ISA(GPT2FAST_KERNEL_EXTERN, name, Args)                                      \
  }                                                                                          \
  static const KernelSet<Args> name{{GPT2FAST_EACH_ISA(GPT2FAST_KERNEL_ENTRY, name, Args)}}; \
  }
