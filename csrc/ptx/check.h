// What every memory access goes through: bounds, alignment, contents that nothing wrote, races, and the counters.
#pragma once
#include "machine.h"

namespace gpt2fast::ptx {

enum class Use : uint8_t { Read, Write, Atomic };

// Fills at[lane] for the lanes in mask that may access `bytes` there; returns these lanes. address: within ins.space.
uint32_t access(Warp& w, const Instruction& ins, uint32_t mask, uint64_t* address, uint32_t bytes, Use use, uint8_t** at);

// The instruction's addresses: register plus immediate, operand `o`.
void addresses(const Warp& w, const Instruction& ins, uint32_t o, uint64_t* address);

uint32_t access_global(Warp& w, const Instruction& ins, uint32_t mask, const uint64_t* address, uint32_t bytes, Use use, uint8_t** at);
uint32_t access_shared(Warp& w, const Instruction& ins, uint32_t mask, const uint64_t* address, uint32_t bytes, Use use, uint8_t** at);

// Counters of one request.
void count_global(Counts& c, uint32_t mask, const uint64_t* address, uint32_t bytes, uint64_t* sectors);
void count_shared(Counts& c, uint32_t mask, const uint64_t* address, uint32_t bytes);

// Races in shared memory; copy: 1 + pc of a cp.async that starts to write there, else 0.
void check_race(Warp& w, uint32_t lane, uint64_t offset, uint32_t bytes, Use use, uint32_t copy = 0);
void land_copy(Warp& w, const Copy& copy, uint32_t mask);
void note_written(Block& block, uint64_t offset, uint32_t bytes);

}  // namespace gpt2fast::ptx
