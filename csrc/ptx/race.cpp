// Races in shared memory. Between warps: an access is in order after another when a barrier that both took part in, or
// a chain of such barriers, lies between them (vector clocks). Within a warp: only while its lanes have parted.
#include "check.h"

#include <cstring>

namespace gpt2fast::ptx {
namespace {

const char* verb(bool write, bool atomic) { return atomic ? "atomic operation" : write ? "write" : "read"; }

void race(Warp& w, uint32_t lane, uint64_t offset, Use use, bool other_write, bool other_atomic, uint32_t other_warp, uint32_t other_pc) {
  std::string message = std::string("shared memory ") + verb(use != Use::Read, use == Use::Atomic) + " at byte " + std::to_string(offset) +
                        " by warp " + std::to_string(w.index) + " and " + verb(other_write, other_atomic) + " by " +
                        (other_warp == w.index ? "other lanes of it" : "warp " + std::to_string(other_warp)) + " at " +
                        w.launch->place(other_pc) + " with no barrier between them";
  w.launch->report("race", message, w, w.pc, int(lane), other_pc);
}

void check_lanes(Warp& w, uint32_t lane, uint32_t cell, uint64_t offset, Use use) {
  auto& [read_lanes, read_pc, write_lanes, write_pc] = w.diverged[cell];
  bool atomic = use == Use::Atomic;
  auto is_atomic = [&](uint32_t pc) { return w.launch->module.code[pc].mode[3] == uint8_t(Use::Atomic); };
  if (write_pc != kNone && !(write_lanes >> lane & 1) && !(atomic && is_atomic(write_pc)))
    race(w, lane, offset, use, true, is_atomic(write_pc), w.index, write_pc);
  if (use != Use::Read && read_pc != kNone && !(read_lanes >> lane & 1)) race(w, lane, offset, use, false, false, w.index, read_pc);
  if (use == Use::Read) {
    read_lanes &= w.active;
    read_pc = w.pc;
  } else {
    write_lanes &= w.active;
    write_pc = w.pc;
  }
}

}  // namespace

void check_race(Warp& w, uint32_t lane, uint64_t offset, uint32_t bytes, Use use, uint32_t copy) {
  Block& block = *w.block;
  int shift = w.launch->grain_shift;
  uint32_t warps = w.launch->warps, self = w.index, stamp = w.clock[self];
  bool converged = w.converged();
  for (uint64_t cell = offset >> shift; cell <= (offset + bytes - 1) >> shift; ++cell) {
    Cell& c = block.cells[cell];
    if (c.copy) {
      std::string what = copy ? "is written by cp.async" : use == Use::Read ? "is read" : "is written";
      w.launch->report("race", "shared memory at byte " + std::to_string(offset) + " " + what + " while the cp.async at " +
                       w.launch->place(c.copy - 1) + " has not been waited for", w, w.pc, int(lane), c.copy - 1);
    }
    bool atomic = use == Use::Atomic;
    if (c.stamp > w.clock[c.warp] && c.warp != self && !(atomic && c.atomic)) race(w, lane, offset, use, true, c.atomic, c.warp, c.pc);
    ReadStamp* reads = block.reads.data() + cell * warps;
    if (use == Use::Read) {
      reads[self] = {stamp, w.pc};
    } else {
      for (uint32_t v = 0; v < warps; ++v)
        if (reads[v].stamp > w.clock[v] && v != self) race(w, lane, offset, use, false, false, v, reads[v].pc);
      c.stamp = stamp;
      c.pc = w.pc;
      c.warp = uint16_t(self);
      c.atomic = atomic;
      if (copy) c.copy = copy;
    }
    if (!converged) check_lanes(w, lane, uint32_t(cell), offset, use);
  }
}

// The bytes arrive, and count as written by this warp now.
void land_copy(Warp& w, const Copy& copy, uint32_t mask) {
  Block& block = *w.block;
  int shift = w.launch->grain_shift;
  for_lanes(mask, [&](int l) {
    uint32_t offset = copy.target[l];
    std::memcpy(block.shared.data() + offset, copy.data[l], copy.bytes);
    note_written(block, offset, copy.bytes);
    if (!w.launch->config.racecheck) return;
    for (uint32_t cell = offset >> shift; cell <= (offset + copy.bytes - 1) >> shift; ++cell) {
      Cell& c = block.cells[cell];
      c.stamp = w.clock[w.index];
      c.pc = copy.pc;
      c.warp = uint16_t(w.index);
      c.atomic = false;
      if (c.copy == copy.pc + 1) c.copy = 0;
    }
  });
}

}  // namespace gpt2fast::ptx
