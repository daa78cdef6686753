// What every memory access goes through: bounds, alignment, contents that nothing wrote, races, and the counters.
#pragma once
#include "machine.h"

namespace gpt2fast::ptx {

// Fills at[lane] for the lanes in mask that may access `bytes` there; returns these lanes. address: within ins.space.
uint32_t access(Warp& w, const Instruction& ins, uint32_t mask, uint64_t* address, uint32_t bytes, Use use,
                uint8_t** at);

// The instruction's addresses: register plus immediate, operand `o`.
void addresses(const Warp& w, const Instruction& ins, uint32_t o, uint64_t* address);

uint32_t access_global(Warp& w, const Instruction& ins, uint32_t mask, const uint64_t* address, uint32_t bytes, Use use,
                       uint8_t** at);
// copy: a cp.async starts to write there, and its bytes arrive later.
uint32_t access_shared(Warp& w, const Instruction& ins, uint32_t mask, const uint64_t* address, uint32_t bytes, Use use,
                       uint8_t** at, bool copy = false);

// Reads of shared memory that nothing wrote, at the end of a block.
void report_unwritten(Block& block);

// Counters of one request.
void count_global(Counts& c, uint32_t mask, const uint64_t* address, uint32_t bytes, uint64_t* sectors);
void count_shared(Counts& c, uint32_t mask, const uint64_t* address, uint32_t bytes);

}  // namespace gpt2fast::ptx
