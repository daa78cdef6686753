// Block barriers: arrival by warps, release, and the order that they make between warps.
#pragma once
#include "machine.h"

namespace gpt2fast::ptx {

// A warp whose live lanes all wait at one barrier arrives there.
void settle_barrier(Warp& w);

// Threads that have exited count as arrived, as they do on Volta and later.
void count_exited(Block& block);

}  // namespace gpt2fast::ptx
