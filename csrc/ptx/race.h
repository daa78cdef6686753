// Finds races in shared memory. Accesses of two warps are ordered if there is a barrier that both warps took part in,
// or a chain of such barriers, between them (vector clocks). Accesses of two lanes of a warp are ordered if both lanes
// came to a barrier or to a bar.warp.sync in between. Lanes run in step here, but that does not count as order: GPUs
// since Volta do not promise it.
#pragma once
#include "module.h"

namespace gpt2fast::ptx {

class Races {
 public:
  void resize(const uint8_t* memory, size_t bytes, int grain_shift, uint32_t warps);
  void start_block();

  // Checks the accesses of the lanes in mask. They must lie within shared memory. copy: a cp.async starts to write.
  void check(Warp& w, uint32_t mask, const uint64_t* offset, uint32_t bytes, Use use, bool copy = false);
  // These lanes of a warp have met. What each of them did so far is ordered before what the others do from now on.
  void meet(Warp& w, uint32_t lanes);
  // The warp has waited for the cp.async at pc. What it wrote counts as written by the warp now.
  void land(Warp& w, uint32_t pc, uint64_t offset, uint32_t bytes);
  // Looks at the bytes that suspicious writes have left. It is called before shared memory changes again, and at the
  // end of a block.
  void settle();
  bool found(uint64_t offset, uint32_t bytes) const;  // whether a race was found there in this block

 private:
  // A cell is the smallest piece that the module's instructions access. A stamp is a time of the accessing warp's
  // clock.
  struct Writer {
    uint32_t pc;
    uint16_t warp;
    bool atomic;
  };
  // A write that is not ordered after another write. It is no race if it leaves the bytes as they were.
  struct Suspect {
    Warp* warp;
    int lane;
    size_t cell;
    uint64_t offset;
    uint32_t pc;
    Writer writer;
    uint32_t content;
  };
  struct Span {
    size_t first, last;
  };
  Span cells(uint64_t offset, uint32_t bytes) const { return {offset >> shift_, (offset + bytes - 1) >> shift_}; }
  template <int kCells>
  uint32_t check_ordered(Warp& w, uint32_t mask, const uint64_t* offset, Use use);
  void check_lane(Warp& w, int lane, uint64_t offset, uint32_t bytes, Use use, bool copy);
  void report_in_flight(Warp& w, int lane, size_t cell, uint64_t offset, const char* what);
  void report_pair(Warp& w, uint32_t pc, int lane, size_t cell, uint64_t offset, Use use, const Writer& other,
                   const char* verb);
  void check_lanes(Warp& w, int lane, size_t cell, uint64_t offset, Use use);
  void note_lane(Warp& w, int lane, size_t cell, Use use);

  uint32_t content(size_t cell) const;

  const uint8_t* memory_ = nullptr;
  std::vector<Suspect> suspects_;
  int shift_ = 2;
  uint32_t warps_ = 0;
  size_t cells_ = 0;
  std::vector<uint32_t> written_, read_;        // per cell: stamp of the last write, greatest stamp of a read
  std::vector<Writer> writer_;                  // per cell
  std::vector<uint8_t> raced_;                  // per cell
  std::vector<uint32_t> read_stamp_, read_pc_;  // per warp and cell
  // For conflicts between lanes of a warp: the lane that last wrote a cell, the lane that read it (or kMany), and when.
  // Time here is the number of instructions that have accessed shared memory.
  uint32_t now_ = 0;
  std::vector<uint32_t> lane_wrote_at_, lane_read_at_;  // per cell; per warp and cell
  std::vector<uint8_t> lane_wrote_, lane_read_;         // per cell; per warp and cell
};

}  // namespace gpt2fast::ptx
