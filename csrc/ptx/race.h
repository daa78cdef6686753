// Races in shared memory. Between warps: an access is in order after another when a barrier that both took part in, or
// a chain of such barriers, lies between them (vector clocks). Within a warp: only while its lanes have parted.
#pragma once
#include "module.h"

namespace gpt2fast::ptx {

class Races {
 public:
  void resize(size_t bytes, int grain_shift, uint32_t warps);
  void start_block();

  // Accesses of the lanes in mask, which lie within shared memory; copy: a cp.async starts to write.
  void check(Warp& w, uint32_t mask, const uint64_t* offset, uint32_t bytes, Use use, bool copy = false);
  // What a cp.async at pc wrote has been waited for: it counts as written by the warp now.
  void land(Warp& w, uint32_t pc, uint64_t offset, uint32_t bytes);
  bool found(uint64_t offset, uint32_t bytes) const;  // a race in this block

 private:
  // A cell is the smallest piece that the module's instructions access. Stamps are times of the accessing warp's clock.
  struct Writer {
    uint32_t pc;
    uint16_t warp;
    bool atomic;
  };
  struct Span {
    size_t first, last;
  };
  Span cells(uint64_t offset, uint32_t bytes) const { return {offset >> shift_, (offset + bytes - 1) >> shift_}; }
  template <int kCells>
  uint32_t check_ordered(Warp& w, uint32_t mask, const uint64_t* offset, Use use);
  void check_lane(Warp& w, int lane, uint64_t offset, uint32_t bytes, Use use, bool copy);
  void report(Warp& w, int lane, size_t cell, const std::string& message, uint32_t other_pc);
  void report_pair(Warp& w, int lane, size_t cell, uint64_t offset, Use use, const char* other, uint32_t other_warp,
                   uint32_t other_pc);
  void check_parted(Warp& w, int lane, size_t cell, uint64_t offset, Use use);

  int shift_ = 2;
  uint32_t warps_ = 0;
  size_t cells_ = 0;
  std::vector<uint32_t> written_, read_;        // per cell: stamp of the last write, greatest stamp of a read
  std::vector<Writer> writer_;                  // per cell
  std::vector<uint8_t> raced_;                  // per cell
  std::vector<uint32_t> read_stamp_, read_pc_;  // per warp and cell
};

}  // namespace gpt2fast::ptx
