// Races in shared memory. Between warps: an access is in order after another when a barrier that both took part in, or
// a chain of such barriers, lies between them (vector clocks). Between lanes of a warp: when both came to a barrier or
// to a bar.warp.sync in between. That lanes run in step here is no order: GPUs since Volta do not promise it.
#pragma once
#include "module.h"

namespace gpt2fast::ptx {

class Races {
 public:
  void resize(const uint8_t* memory, size_t bytes, int grain_shift, uint32_t warps);
  void start_block();

  // Accesses of the lanes in mask, which lie within shared memory; copy: a cp.async starts to write.
  void check(Warp& w, uint32_t mask, const uint64_t* offset, uint32_t bytes, Use use, bool copy = false);
  // These lanes of a warp have met: what each of them did so far is in order before what the others do from now on.
  void meet(Warp& w, uint32_t lanes);
  // What a cp.async at pc wrote has been waited for: it counts as written by the warp now.
  void land(Warp& w, uint32_t pc, uint64_t offset, uint32_t bytes);
  // Looks at what suspicious writes have left; before shared memory changes again, and at the end of a block.
  void settle();
  bool found(uint64_t offset, uint32_t bytes) const;  // a race in this block

 private:
  // A cell is the smallest piece that the module's instructions access. Stamps are times of the accessing warp's clock.
  struct Writer {
    uint32_t pc;
    uint16_t warp;
    bool atomic;
  };
  // A second write without order, which is none if it left the bytes as they were.
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
  // Of the lanes of a warp: the last one that wrote a cell, the one that read it or kMany, and when they did. Time here
  // counts the instructions that access shared memory.
  uint32_t now_ = 0;
  std::vector<uint32_t> lane_wrote_at_, lane_read_at_;  // per cell; per warp and cell
  std::vector<uint8_t> lane_wrote_, lane_read_;         // per cell; per warp and cell
};

}  // namespace gpt2fast::ptx
