// Block barriers: warps arrive, the barrier releases them, and this orders their accesses to memory.
#pragma once
#include "machine.h"

namespace gpt2fast::ptx {

// If all live lanes of a warp wait at the same barrier, the warp arrives there.
void settle_barrier(Warp& w);

// Threads that have exited count as arrived, as they do on Volta and later.
void count_exited(Block& block);

}  // namespace gpt2fast::ptx
