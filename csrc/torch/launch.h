// The runner of a kernel: its tasks on torch's threads, memory of its own from torch's allocator.
#pragma once
#include <ATen/Parallel.h>

#include "../cpu/dispatch.h"

namespace gpt2fast {

template <class Args>
void launch(cpu::Kernel<Args> cpu::Table::* entry, const std::type_identity_t<Args>& args) {
  const cpu::Kernel<Args>& kernel = cpu::table().*entry;
  at::parallel_for(0, kernel.tasks(args), 1, [&](int64_t begin, int64_t end) { kernel.run(args, begin, end); });
}

}  // namespace gpt2fast
