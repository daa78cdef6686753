// Finds races in global memory, between the blocks of a launch and between the warps of a block. Blocks run one after
// the other here, but on a GPU they do not. So an access of an earlier block counts as ordered only if this block has
// joined the earlier one: the earlier block wrote, executed a fence, and then stored or added something atomically, and
// this block has read that atomically.
#pragma once
#include <memory>
#include <unordered_map>
#include <vector>

#include "module.h"

namespace gpt2fast::ptx {

struct Buffer;

class GlobalRaces {
 public:
  ~GlobalRaces();
  // grain_shift: the log2 of the smallest size in bytes that the kernel's instructions access.
  void start(size_t buffers, size_t instructions, int grain_shift, uint32_t warps, bool same_value);
  void start_block(uint32_t block);
  bool on() const { return !shadows_.empty(); }

  // Checks the accesses of the lanes in mask, before they happen. They must lie within the buffer.
  void check(Warp& w, const Instruction& ins, uint32_t buffer, uint32_t mask, const uint64_t* address, uint32_t bytes,
             Use use);
  // From now on the warp may publish what it has done and what it is ordered after. wide: to other blocks too.
  void fence(Warp& w, bool wide);
  // Looks at the bytes that suspicious writes have left. It is called before memory changes again, and at the end of a
  // block.
  void settle();

 private:
  // One instruction that one warp executed. A cell refers to its writer and its readers by the numbers of accesses.
  struct Access {
    uint32_t block, stamp, pc;
    uint16_t warp;
    uint8_t order;
    Use use;
  };
  // The record of the smallest piece of memory. A number up to base_ means nobody, or an access of an earlier launch.
  struct Cell {
    uint32_t writer;
    uint32_t reader;       // the last one
    uint32_t other_warp;   // a reader before it, of another warp of its block
    uint32_t other_block;  // a reader of another block
  };
  // A write that is not ordered after another write. It is no race if it leaves the bytes as they were.
  struct Suspect {
    Warp* warp;
    int lane;
    uint32_t buffer;
    uint64_t address;
    uint32_t pc;
    Access other;
    uint64_t content[2];
  };
  struct Shadow {  // a buffer's pages of cells, by address
    uint64_t first_page = 0;
    std::vector<std::unique_ptr<Cell[]>> pages;
  };
  // Pages are reused by the next launch without clearing: new accesses have greater numbers than all those in the
  // pages.
  struct Pool {
    std::vector<std::unique_ptr<Cell[]>> pages;
    uint32_t next = 0;
  };
  static Pool& pool();
  const Access& at(uint32_t number) const { return accesses_[number - base_]; }

  using Blocks = std::vector<uint64_t>;  // a bit for each block
  // What an atomic access at an address has published.
  struct Publication {
    std::shared_ptr<const Blocks> blocks;
    uint32_t block = kNone, stamp = 0, warp = 0;
  };

  uint32_t note(const Warp& w, const Instruction& ins, Use use);
  Cell* page(Shadow& shadow, uint64_t number);
  void forget();
  bool ordered(const Warp& w, const Access& other) const;
  bool fine(const Warp& w, const Access& self, uint32_t other);
  bool replicated(const Warp& w, const Cell& c, uint32_t pc, bool by_self) const;
  void report(Warp& w, int lane, uint32_t buffer, uint64_t address, uint32_t pc, Use use, const Access& other);
  template <bool kReads>
  void check_lanes(Warp& w, uint32_t self, uint32_t buffer, uint32_t mask, const uint64_t* address, uint32_t bytes);
  void suspect(Warp& w, int lane, uint32_t buffer, uint64_t address, const Access& other);
  void join(Warp& w, uint64_t address);
  void publish(Warp& w, uint64_t address);

  std::vector<Shadow> shadows_;  // per buffer
  std::vector<Access> accesses_;
  std::vector<uint32_t> last_access_;  // per pc
  std::vector<Suspect> suspects_;
  int shift_ = 2;
  uint32_t base_ = 0;               // the number of accesses_[0], which stands for nobody
  uint32_t warps_ = 0, block_ = 0;  // block_: the number of the running block
  bool same_value_ = false;

  Blocks joined_;  // the earlier blocks that this block is ordered after
  std::shared_ptr<const Blocks> last_joined_;
  std::shared_ptr<const Blocks> snapshot_;      // joined_ and this block, copied when it is published
  std::vector<uint32_t> fenced_, fenced_here_;  // per warp: the last stamp before a fence for all blocks, for its block
  bool any_fence_ = false;
  std::vector<std::vector<uint32_t>> published_;  // per block and warp: the stamp that those who join are ordered after
  std::unordered_map<uint64_t, Publication> publications_;
};

}  // namespace gpt2fast::ptx
