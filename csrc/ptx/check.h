// Every memory access goes through these functions. They check bounds, alignment, reads of memory that nothing wrote,
// and races, and they update the counters.
#pragma once
#include "machine.h"

namespace gpt2fast::ptx {

// Fills at[lane] for the lanes in mask that may access `bytes` there; returns these lanes. address: within ins.space.
uint32_t access(Warp& w, const Instruction& ins, uint32_t mask, uint64_t* address, uint32_t bytes, Use use,
                uint8_t** at);

// The instruction's addresses: the register of operand `o` plus the immediate.
void addresses(const Warp& w, const Instruction& ins, uint32_t o, uint64_t* address);

uint32_t access_global(Warp& w, const Instruction& ins, uint32_t mask, const uint64_t* address, uint32_t bytes, Use use,
                       uint8_t** at);
// copy: a cp.async starts to write there; its bytes arrive later.
uint32_t access_shared(Warp& w, const Instruction& ins, uint32_t mask, const uint64_t* address, uint32_t bytes, Use use,
                       uint8_t** at, bool copy = false);

// At the end of a block, reports reads of shared memory that nothing wrote.
void report_unwritten(Block& block);

// Adds one request to the counters.
void count_global(Counts& c, uint32_t mask, const uint64_t* address, uint32_t bytes, uint64_t* sectors);
void count_shared(Counts& c, uint32_t mask, const uint64_t* address, uint32_t bytes);

}  // namespace gpt2fast::ptx
