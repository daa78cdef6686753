// The running machine: warps with their registers and groups of lanes, a block with its shared memory and barriers,
// a launch with its buffers, counters and errors.
#pragma once
#include <array>
#include <deque>
#include <unordered_map>

#include "global_race.h"
#include "race.h"
#include "zeros.h"

namespace gpt2fast::ptx {

struct Counts {  // of memory accesses
  uint64_t requests = 0, bytes = 0, sectors = 0, ideal_sectors = 0, wavefronts = 0, bank_conflicts = 0;
};

struct Traffic {  // of a buffer
  uint64_t read_bytes = 0, written_bytes = 0, read_sectors = 0, written_sectors = 0;
};

struct Buffer {
  uint64_t address = 0, bytes = 0;
  std::string name;
  bool read_only = false;
  uint8_t* written = nullptr;        // a byte for each byte, 0 where nothing wrote yet; none: all is initialised
  std::vector<uint8_t> own_written;  // used where `written` is not given
  Traffic traffic;
};

struct Error {
  std::string kind, message;
  uint64_t count = 1;  // how many times this was found between these places
  uint32_t pc = kNone, other_pc = kNone;
  std::array<uint32_t, 3> thread{}, block{};
  bool has_thread = false, has_address = false, has_offset = false;
  std::string buffer;
  uint64_t address = 0, offset = 0;  // offset: from the start of the buffer
};

struct LaunchConfig {
  std::array<uint32_t, 3> grid{1, 1, 1}, block{1, 1, 1};
  uint32_t dynamic_shared = 0;
  std::vector<uint8_t> params;
  std::vector<Buffer> buffers;
  uint64_t budget = 0;
  bool memcheck = true, racecheck = true;
  bool same_value_races = false;  // blocks that store the same in one place race too
};

// Lanes at one program counter that do not run: they are behind, or wait.
struct Group {
  enum State : uint8_t { Ready, AtBarrier, AtWarp };
  uint32_t pc = 0, mask = 0;
  State state = Ready;
  uint32_t barrier = 0;  // AtBarrier: its id; AtWarp: the lanes that must come
};

enum class Event : uint8_t { None, Jump, Block, Stop };

// A cp.async instruction of a warp, under way until it is waited for.
struct Copy {
  uint32_t pc = 0, mask = 0, group = 0, bytes = 0;
  uint32_t target[kLanes];  // in shared memory
  alignas(16) uint8_t data[kLanes][16];
};

struct Block;
struct Launch;

struct Warp {
  Block* block = nullptr;
  Launch* launch = nullptr;
  uint8_t* registers = nullptr;
  uint16_t* pointers = nullptr;  // per slot: 1 + the buffer that the register points into, 0 for unknown
  uint32_t index = 0;
  uint32_t pc = 0, active = 0;  // the group that runs
  uint32_t next_pc = kNone;     // least of the ready groups that do not run
  uint32_t exited = 0, present = 0;
  uint32_t full_turns = 0;  // in a row that other ready groups have waited through
  uint32_t carry = 0;       // the condition code of add.cc and sub.cc
  Event event = Event::None;
  std::vector<Group> groups;
  std::vector<uint32_t> calls[kLanes];
  std::deque<Copy> copies;
  uint32_t copy_groups[kLanes] = {};  // committed so far
  std::vector<uint32_t> clock;        // of every warp: what this warp is ordered after
  uint32_t horizon = 0;               // the least of the other warps'
  uint32_t met_at[kLanes] = {};       // when each lane last met others at a barrier, in the time of Races

  template <class T>
  T* lanes(uint32_t offset) const {
    return reinterpret_cast<T*>(registers + offset);
  }
  uint32_t& predicate(uint32_t offset) const { return *reinterpret_cast<uint32_t*>(registers + offset); }
  uint32_t live() const { return present & ~exited; }
  bool converged() const { return active == live(); }
  bool finished() const { return exited == present; }

  void jump(uint32_t target) {
    pc = target;
    event = Event::Jump;
  }
  void split(uint32_t mask, uint32_t target);  // these lanes of the running group go to target
  void split_team(uint32_t mask);              // these lanes execute the same instruction, but later
  void park(Group::State state, uint32_t barrier);
  bool choose_others();
  bool choose();  // the ready group with the least pc; false: none
  void exit(uint32_t mask);
  // Brings the lanes that an instruction is for together at it. False: the group waits for the others.
  bool gather(uint32_t members, uint32_t mask);
  bool gather_all(uint32_t mask);  // the whole warp, without which the instruction is undefined
  bool refuse(const std::string& why, uint32_t mask);
};

struct BarrierState {
  uint32_t arrived = 0, expected = 0, voters = 0, count_true = 0;
  bool counted = false;  // by a number of threads that the instruction gives
  uint32_t pc = kNone;
  std::vector<uint32_t> waiting;  // warps
  std::vector<uint32_t> clock;    // what those that arrived had done by then
};

// A read of shared memory before anything was written there.
struct UnwrittenRead {
  uint32_t warp;
  int lane;
  uint32_t pc;
  uint64_t offset;
  uint32_t bytes;
};

struct Block {
  Launch* launch = nullptr;
  std::array<uint32_t, 3> id{};
  std::vector<Warp> warps;
  std::vector<uint8_t> shared, shared_written, local, local_written;
  Races races;
  std::vector<UnwrittenRead> unwritten;
  BarrierState barriers[16];
  bool in_shared(uint64_t offset, uint64_t bytes) const;
};

struct Launch {
  const Module& module;
  const Function& kernel;
  LaunchConfig config;
  std::vector<Buffer> buffers;  // by address
  Block block;
  uint32_t threads = 0, warps = 0, shared_bytes = 0;
  Zeros<uint64_t> warp_counts, thread_counts;  // per pc
  Zeros<Counts> global_counts, shared_counts;  // per pc: the parts of its accesses that fall there
  Zeros<uint32_t> hint;                        // per pc: the buffer of the last access
  uint64_t instructions = 0, barriers = 0, divergent_branches = 0, tensor_flops = 0;
  GlobalRaces global_races;
  std::vector<Error> errors, notes;  // notes: what is no error, but worth knowing
  uint64_t error_count = 0;
  std::unordered_map<uint64_t, size_t> reported;  // their index in errors
  bool wrote = false;                             // in this turn: memory that others see has changed
  uint64_t quiet = 0;                             // instructions since then
  uint32_t polled = kNone;                        // the last read of global memory in this turn
  bool stopped = false;
  std::string output;  // of printf

  Launch(const Module& module, const std::string& kernel, LaunchConfig config);
  void run();

  // Adds one error per kind and source lines; the rest is only counted, and gives no pointer.
  Error* report(const char* kind, const std::string& message, const Warp& warp, uint32_t pc, int lane,
                uint32_t other_pc = kNone);
  // Counts a finding that is reported already; for those who would spend long on the message.
  bool repeats(const char* kind, uint32_t pc, uint32_t other_pc = kNone);
  void note(const char* kind, const std::string& message, const Warp& warp, uint32_t pc);
  void stop() { stopped = true; }
  std::string place(uint32_t pc) const;  // "line 12 (file.py:3)"
  std::array<uint32_t, 3> thread(const Warp& warp, int lane) const;
  uint32_t find_buffer(uint64_t address) const;  // index, or kNone

 private:
  void start_block();
  void start_warp(Warp& warp);
  bool run_warp(Warp& warp);
  bool step(Warp& warp, uint64_t quantum);
  void run_block();
  void report_deadlock();
  void report_budget(const Warp& warp);
  uint64_t key(const char* kind, uint32_t pc, uint32_t other_pc) const;

  Zeros<uint8_t> register_file_;
  Zeros<uint16_t> pointer_file_;
  std::vector<uint32_t> entry_functions_;  // whose constants the kernel needs
};

// For all lanes in mask; the whole warp as one loop that the compiler makes vectors of.
template <class D, class F>
[[gnu::always_inline]] inline void each(uint32_t mask, D* d, F f) {
  if (mask == kAllLanes) {
#pragma GCC ivdep
    for (int l = 0; l < kLanes; ++l) d[l] = f(l);
  } else {
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
      int l = __builtin_ctz(rest);
      d[l] = f(l);
    }
  }
}

template <class F>
inline void for_lanes(uint32_t mask, F f) {
  for (uint32_t rest = mask; rest; rest &= rest - 1) f(__builtin_ctz(rest));
}

template <class F>
inline uint32_t ballot(F f) {
  uint32_t bits = 0;
  for (int l = 0; l < kLanes; ++l) bits |= uint32_t(bool(f(l))) << l;
  return bits;
}

inline void set_predicate(uint32_t& p, uint32_t mask, uint32_t value) { p = (p & ~mask) | (value & mask); }

}  // namespace gpt2fast::ptx
