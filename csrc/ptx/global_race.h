// Races in global memory, between the blocks of a launch and between the warps of a block. Blocks run one after the
// other here, so an access of an earlier block is in order only where this block has joined it: the earlier one wrote,
// fenced and then stored or added something atomically, and this block has read that atomically.
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
  // grain_shift: of the least piece that the kernel's instructions access.
  void start(size_t buffers, size_t instructions, int grain_shift, uint32_t warps, bool same_value);
  void start_block(uint32_t block);
  bool on() const { return !shadows_.empty(); }

  // Accesses of the lanes in mask, which lie within the buffer; before they happen.
  void check(Warp& w, const Instruction& ins, uint32_t buffer, uint32_t mask, const uint64_t* address, uint32_t bytes,
             Use use);
  // What the warp has done or is ordered after may be published from now on; wide: to other blocks too.
  void fence(Warp& w, bool wide);
  // Looks at what suspicious writes have left; before memory changes again, and at the end of a block.
  void settle();

 private:
  // One instruction that one warp executed: what a cell remembers of its writer and its readers is such an index.
  struct Access {
    uint32_t block, stamp, pc;
    uint16_t warp;
    uint8_t order;
    Use use;
  };
  // The smallest piece of memory. Up to base_: nobody, or somebody of a launch before this one.
  struct Cell {
    uint32_t writer;
    uint32_t reader;       // the last one
    uint32_t other_warp;   // a reader before it, of another warp of its block
    uint32_t other_block;  // a reader of another block
  };
  // A second write without order, which is none if it left the bytes as they were.
  struct Suspect {
    Warp* warp;
    int lane;
    uint32_t buffer;
    uint64_t address;
    uint32_t pc;
    Access other;
    uint64_t content[2];
  };
  struct Shadow {  // pages of cells, by the address
    uint64_t first_page = 0;
    std::vector<std::unique_ptr<Cell[]>> pages;
  };
  // Pages go from one launch to the next as they are: new accesses have greater numbers than all that is in them.
  struct Pool {
    std::vector<std::unique_ptr<Cell[]>> pages;
    uint32_t next = 0;
  };
  static Pool& pool();
  const Access& at(uint32_t number) const { return accesses_[number - base_]; }

  using Blocks = std::vector<uint64_t>;  // a bit for each
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
  uint32_t warps_ = 0, block_ = 0;  // block_: the running one's number
  bool same_value_ = false;

  Blocks joined_;  // the earlier blocks that this one comes after
  std::shared_ptr<const Blocks> last_joined_;
  std::shared_ptr<const Blocks> snapshot_;      // of joined_, with this block; made when it is published
  std::vector<uint32_t> fenced_, fenced_here_;  // per warp: the last stamp before a fence for all, for its block
  bool any_fence_ = false;
  std::vector<std::vector<uint32_t>> published_;  // per block and warp: what others that join it come after
  std::unordered_map<uint64_t, Publication> publications_;
};

}  // namespace gpt2fast::ptx
