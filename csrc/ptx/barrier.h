// Block barriers: arrival by warps, release, and the order that they make between warps.
#pragma once
#include "machine.h"

namespace gpt2fast::ptx {

// What the first warps did so far comes before what the second warps do from now on.
void order_warps(Block& block, const std::vector<uint32_t>& arrivers, const std::vector<uint32_t>& waiters);

// A warp whose live lanes all wait at one barrier arrives there.
void settle_barrier(Warp& w);

}  // namespace gpt2fast::ptx
