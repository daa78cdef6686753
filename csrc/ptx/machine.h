// The state of a running launch. A Launch has buffers, counters and errors, and runs one Block at a time. A Block has
// shared memory, barriers and warps. A Warp has registers and groups of lanes.
#pragma once
#include <array>
#include <deque>
#include <unordered_map>

#include "global_race.h"
#include "race.h"
#include "zeros.h"

namespace gpt2fast::ptx {

struct Counts {  // counters of memory accesses
  uint64_t requests = 0, bytes = 0, sectors = 0, ideal_sectors = 0, wavefronts = 0, bank_conflicts = 0;
};

struct Traffic {  // what was moved from and to a buffer
  uint64_t read_bytes = 0, written_bytes = 0, read_sectors = 0, written_sectors = 0;
};

struct Buffer {
  uint64_t address = 0, bytes = 0;
  std::string name;
  bool read_only = false;
  // A byte for each byte of the buffer, 0 where nothing has written yet. Null: the whole buffer is initialised.
  uint8_t* written = nullptr;
  std::vector<uint8_t> own_written;  // used where `written` is not given
  Traffic traffic;
};

struct Error {
  std::string kind, message;
  uint64_t count = 1;  // how often this was found at these places
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
  bool same_value_races = false;  // whether blocks that store the same value in the same place race too
};

// Lanes at one program counter that are not running: they are behind, or they wait.
struct Group {
  enum State : uint8_t { Ready, AtBarrier, AtWarp };
  uint32_t pc = 0, mask = 0;
  State state = Ready;
  uint32_t barrier = 0;  // AtBarrier: its id; AtWarp: the lanes that must come
};

enum class Event : uint8_t { None, Jump, Block, Stop };

// A cp.async instruction of a warp. It is in flight until the warp waits for it.
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
  uint32_t pc = 0, active = 0;  // the running group: its program counter and its lanes
  uint32_t next_pc = kNone;     // the lowest program counter of the ready groups that do not run
  uint32_t exited = 0, present = 0;
  uint32_t full_turns = 0;  // how many turns in a row other ready groups have waited
  uint32_t carry = 0;       // the condition code of add.cc and sub.cc
  Event event = Event::None;
  std::vector<Group> groups;
  std::vector<uint32_t> calls[kLanes];
  std::deque<Copy> copies;
  uint32_t copy_groups[kLanes] = {};  // how many groups of copies each lane has committed
  std::vector<uint32_t> clock;        // a vector clock: the time of each warp up to which this warp is ordered after it
  uint32_t horizon = 0;               // the least of the other warps' times in clock
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
  // Brings all lanes that an instruction needs together at it. False: the group waits for the others.
  bool gather(uint32_t members, uint32_t mask);
  bool gather_all(uint32_t mask);  // for instructions that are undefined unless the whole warp executes them
  bool refuse(const std::string& why, uint32_t mask);
};

struct BarrierState {
  uint32_t arrived = 0, expected = 0, voters = 0, count_true = 0;
  bool counted = false;  // whether the instruction gives a number of threads
  uint32_t pc = kNone;
  std::vector<uint32_t> waiting;  // warps
  std::vector<uint32_t> clock;    // the latest times in the clocks of the warps that have arrived
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
  Zeros<Counts> global_counts, shared_counts;  // per pc: its accesses to global and to shared memory
  Zeros<uint32_t> hint;                        // per pc: the buffer of the last access
  uint64_t instructions = 0, barriers = 0, divergent_branches = 0, tensor_flops = 0;
  GlobalRaces global_races;
  std::vector<Error> errors, notes;  // a note is not an error, but worth knowing
  uint64_t error_count = 0;
  std::unordered_map<uint64_t, size_t> reported;  // from the key of a finding to its index in errors
  bool wrote = false;                             // whether memory that others see has changed in this turn
  uint64_t quiet = 0;                             // instructions since such memory last changed
  uint32_t polled = kNone;                        // the pc of the last read of global memory in this turn
  bool stopped = false;
  std::string output;  // of printf

  Launch(const Module& module, const std::string& kernel, LaunchConfig config);
  void run();

  // Adds an error, one for each kind and pair of source lines. Repeated ones are only counted, and the result is null.
  Error* report(const char* kind, const std::string& message, const Warp& warp, uint32_t pc, int lane,
                uint32_t other_pc = kNone);
  // If the finding is reported already, counts it and returns true. Callers use it to avoid building a long message.
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
  std::vector<uint32_t> entry_functions_;  // the functions whose constants the kernel needs
};

// d[l] = f(l) for all lanes in mask. For a whole warp this is one loop, which the compiler vectorises.
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
