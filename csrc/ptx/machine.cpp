// Runs a launch. Blocks run one after the other. The warps of a block take turns. Of a warp, the lanes with the lowest
// program counter run.
#include "machine.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <stdexcept>

#include "check.h"

namespace gpt2fast::ptx {
namespace {

constexpr uint64_t kTurn = 4096;    // instructions that a warp executes before it is the next warp's turn
constexpr uint32_t kPatience = 16;  // turns of one group of a warp's lanes before another group gets one
constexpr uint64_t kMostThreads = 1024, kMostShared = 163 * 1024;  // limits of a block on sm_80
constexpr std::array<uint32_t, 3> kMostBlocks{0x7fffffff, 65535, 65535}, kLargestBlock{1024, 1024, 64};

std::string sizes(const std::array<uint32_t, 3>& a) {
  return "(" + std::to_string(a[0]) + ", " + std::to_string(a[1]) + ", " + std::to_string(a[2]) + ")";
}

void check_sizes(const std::string& name, const LaunchConfig& config) {
  uint64_t threads = uint64_t(config.block[0]) * config.block[1] * config.block[2];
  for (size_t axis = 0; axis < 3; ++axis) {
    if (config.grid[axis] == 0 || config.grid[axis] > kMostBlocks[axis])
      throw std::invalid_argument(name + ": a grid has 1 to " + sizes(kMostBlocks) + " blocks, got " +
                                  sizes(config.grid));
    if (config.block[axis] == 0 || config.block[axis] > kLargestBlock[axis] || threads > kMostThreads)
      throw std::invalid_argument(name + ": a block has 1 to " + sizes(kLargestBlock) + " threads, " +
                                  std::to_string(kMostThreads) + " in all, got " + sizes(config.block));
  }
}

}  // namespace

Launch::Launch(const Module& m, const std::string& name, LaunchConfig c)
    : module(m), kernel(m.kernel(name)), config(std::move(c)) {
  check_sizes(name, config);
  uint64_t count = uint64_t(config.block[0]) * config.block[1] * config.block[2];
  if (kernel.max_threads && count > kernel.max_threads)
    throw std::invalid_argument(name + ": compiled for blocks of at most " + std::to_string(kernel.max_threads) +
                                " threads, got " + std::to_string(count));
  if (config.params.size() != kernel.param_bytes)
    throw std::invalid_argument(name + ": expected " + std::to_string(kernel.param_bytes) +
                                " bytes of parameters, got " + std::to_string(config.params.size()));
  threads = uint32_t(count);
  warps = (threads + kLanes - 1) / kLanes;
  if (kernel.shared_bytes + config.dynamic_shared > kMostShared)
    throw std::invalid_argument(name + ": a block has at most " + std::to_string(kMostShared) +
                                " bytes of shared memory, got " + std::to_string(kernel.shared_bytes) + " static and " +
                                std::to_string(config.dynamic_shared) + " dynamic");
  bool dynamic = module.uses_dynamic_shared && config.dynamic_shared;
  shared_bytes = std::max(kernel.shared_bytes, dynamic ? module.dynamic_shared_start + config.dynamic_shared : 0);
  buffers = std::move(config.buffers);
  for (Buffer& b : buffers)
    if (!b.own_written.empty()) b.written = b.own_written.data();
  for (const auto& v : module.variables) {
    Buffer b;
    b.address = v->address();
    b.bytes = v->bytes;
    b.name = v->name;
    b.read_only = v->space == Space::Const;
    buffers.push_back(std::move(b));
  }
  std::sort(buffers.begin(), buffers.end(), [](const Buffer& a, const Buffer& b) { return a.address < b.address; });
  for (size_t i = 1; i < buffers.size(); ++i)
    if (buffers[i - 1].address + buffers[i - 1].bytes > buffers[i].address)
      throw std::invalid_argument("buffers '" + buffers[i - 1].name + "' and '" + buffers[i].name + "' overlap");
  size_t n = module.code.size();
  warp_counts.resize(n);
  thread_counts.resize(n);
  global_counts.resize(n);
  shared_counts.resize(n);
  hint.resize(n);
  std::function<void(const Function&)> need = [&](const Function& f) {
    auto index = uint32_t(&f - module.functions.data());
    if (std::find(entry_functions_.begin(), entry_functions_.end(), index) != entry_functions_.end()) return;
    entry_functions_.push_back(index);
    for (uint32_t callee : f.calls) need(module.functions[callee]);
  };
  need(kernel);
  int grain = 4;  // log2 of the smallest access to global memory, in bytes
  for (uint32_t index : entry_functions_) {
    const Function& f = module.functions[index];
    if (!f.error.empty()) throw std::invalid_argument(f.error);
    for (uint32_t pc = f.first; pc < f.first + f.count; ++pc) {
      const Instruction& i = module.code[pc];
      if (i.kind != Class::Memory || i.bytes == 0) continue;
      while ((1u << grain) > uint32_t(i.bytes) * i.elements) --grain;
    }
  }
  uint64_t blocks = uint64_t(config.grid[0]) * config.grid[1] * config.grid[2];
  if (config.racecheck && (blocks > 1 || warps > 1))
    global_races.start(buffers.size(), n, grain, warps, config.same_value_races);
  size_t stride = (module.register_bytes + 63) / 64 * 64;
  register_file_.resize(stride * warps + 64);
  pointer_file_.resize(size_t(module.pointer_slots) * warps);
  block.launch = this;
  block.warps.resize(warps);
  auto base = (reinterpret_cast<uintptr_t>(register_file_.data()) + 63) / 64 * 64;
  for (uint32_t w = 0; w < warps; ++w) {
    Warp& warp = block.warps[w];
    warp.block = &block;
    warp.launch = this;
    warp.index = w;
    warp.registers = reinterpret_cast<uint8_t*>(base + stride * w);
    warp.pointers = pointer_file_.data() + size_t(module.pointer_slots) * w;
    uint32_t lanes = std::min<uint32_t>(kLanes, threads - w * kLanes);
    warp.present = lanes == kLanes ? kAllLanes : (1u << lanes) - 1;
    for (uint32_t index : entry_functions_) {
      for (const Constant& k : module.functions[index].constants) {
        if (k.bits == 1) warp.predicate(k.offset) = uint32_t(k.value);
        for (int l = 0; k.bits > 1 && l < kLanes; ++l) {
          if (k.bits == 16) warp.lanes<uint16_t>(k.offset)[l] = uint16_t(k.value);
          if (k.bits == 32) warp.lanes<uint32_t>(k.offset)[l] = uint32_t(k.value);
          if (k.bits == 64) warp.lanes<uint64_t>(k.offset)[l] = k.value;
        }
      }
    }
  }
  block.shared.resize(shared_bytes + 16);
  block.shared_written.resize(shared_bytes + 16);
  if (config.racecheck)
    block.races.resize(block.shared.data(), shared_bytes,
                       module.shared_grain == 1   ? 0
                       : module.shared_grain == 2 ? 1
                                                  : 2,
                       warps);
  block.local.resize(size_t(module.local_bytes) * threads);
  block.local_written.resize(block.local.size());
}

std::array<uint32_t, 3> Launch::thread(const Warp& warp, int lane) const {
  uint32_t i = warp.index * kLanes + uint32_t(lane);
  return {i % config.block[0], i / config.block[0] % config.block[1], i / config.block[0] / config.block[1]};
}

uint32_t Launch::find_buffer(uint64_t address) const {
  auto it = std::upper_bound(buffers.begin(), buffers.end(), address,
                             [](uint64_t a, const Buffer& b) { return a < b.address; });
  if (it == buffers.begin()) return kNone;
  --it;
  return address - it->address < it->bytes ? uint32_t(it - buffers.begin()) : kNone;
}

void Launch::start_warp(Warp& warp) {
  warp.pc = kernel.first;
  warp.active = warp.present;
  warp.exited = 0;
  warp.full_turns = 0;
  warp.next_pc = kNone;
  warp.groups.clear();
  warp.copies.clear();
  warp.clock.assign(warps, 0);
  warp.clock[warp.index] = 1;
  warp.horizon = warps == 1 ? kNone - 1 : 0;
  for (int l = 0; l < kLanes; ++l) {
    warp.calls[l].clear();
    warp.copy_groups[l] = 0;
    warp.met_at[l] = 0;
  }
  std::fill(warp.pointers, warp.pointers + module.pointer_slots, uint16_t{0});
  for (uint32_t index : entry_functions_) {
    for (const SpecialRegister& s : module.functions[index].specials) {
      for (int l = 0; l < kLanes; ++l) {
        std::array<uint32_t, 3> t = thread(warp, l);
        uint64_t v = 0;
        uint32_t bit = 1u << l;
        switch (s.what) {
          case Special::TidX:
          case Special::TidY:
          case Special::TidZ:
            v = t[int(s.what) - int(Special::TidX)];
            break;
          case Special::NtidX:
          case Special::NtidY:
          case Special::NtidZ:
            v = config.block[int(s.what) - int(Special::NtidX)];
            break;
          case Special::CtaidX:
          case Special::CtaidY:
          case Special::CtaidZ:
            v = block.id[int(s.what) - int(Special::CtaidX)];
            break;
          case Special::NctaidX:
          case Special::NctaidY:
          case Special::NctaidZ:
            v = config.grid[int(s.what) - int(Special::NctaidX)];
            break;
          case Special::LaneId:
            v = uint64_t(l);
            break;
          case Special::WarpId:
            v = warp.index;
            break;
          case Special::NWarpId:
            v = warps;
            break;
          case Special::SmId:
          case Special::GridId:
            v = 0;
            break;
          case Special::NSmId:
            v = 1;
            break;
          case Special::LaneMaskEq:
            v = bit;
            break;
          case Special::LaneMaskLt:
            v = bit - 1;
            break;
          case Special::LaneMaskLe:
            v = bit | (bit - 1);
            break;
          case Special::LaneMaskGt:
            v = ~(bit | (bit - 1));
            break;
          case Special::LaneMaskGe:
            v = ~(bit - 1);
            break;
          case Special::DynamicSharedBytes:
            v = config.dynamic_shared;
            break;
          case Special::TotalSharedBytes:
            v = shared_bytes;
            break;
          case Special::DynamicSharedStart:
            v = module.dynamic_shared_start;
            break;
          case Special::ParamStart:
            v = reinterpret_cast<uint64_t>(config.params.data());
            break;
        }
        v += s.plus;
        if (s.bits == 16)
          warp.lanes<uint16_t>(s.offset)[l] = uint16_t(v);
        else if (s.bits == 32)
          warp.lanes<uint32_t>(s.offset)[l] = uint32_t(v);
        else
          warp.lanes<uint64_t>(s.offset)[l] = v;
      }
    }
  }
}

void Launch::start_block() {
  std::fill(block.shared.begin(), block.shared.end(), uint8_t{0});
  std::fill(block.shared_written.begin(), block.shared_written.end(), uint8_t{0});
  std::fill(block.local_written.begin(), block.local_written.end(), uint8_t{0});
  if (config.racecheck) block.races.start_block();
  if (global_races.on())
    global_races.start_block(block.id[0] + config.grid[0] * (block.id[1] + config.grid[1] * block.id[2]));
  quiet = 0;
  for (BarrierState& b : block.barriers) b = {};
  for (Warp& w : block.warps) start_warp(w);
}

// Runs one warp for a turn. Returns false if the warp can do nothing until another warp does something.
bool Launch::step(Warp& w, uint64_t quantum) {
  const Instruction* code = module.code.data();
  bool fair = w.full_turns >= kPatience;
  if (fair ? !w.choose_others() : !w.active && !w.choose()) return false;
  uint64_t executed = 0;
  wrote = false;
  polled = kNone;
  while (executed < quantum) {
    const Instruction& ins = code[w.pc];
    uint32_t mask = w.active;
    if (ins.guard != kNone) {
      uint32_t p = w.predicate(ins.guard);
      mask &= ins.guard_negated ? ~p : p;
      if (ins.sync && mask != w.active && mask) w.split(w.active & ~mask, w.pc + 1);
    }
    ++executed;
    ++warp_counts[w.pc];
    thread_counts[w.pc] += uint64_t(__builtin_popcount(mask));
    if (mask) {
      uint32_t pc = w.pc;
      ins.run(w, ins, mask);
      if (ins.pointer) {
        uint16_t from = w.pointers[ins.pointer_from[0]], other = w.pointers[ins.pointer_from[1]];
        uint16_t to = from == 0 ? other : other == 0 || other == from ? from : uint16_t{0};
        uint16_t& slot = w.pointers[ins.pointer];
        slot = mask == w.live() || slot == to ? to : uint16_t{0};
        if (ins.pointer_beside) w.pointers[ins.pointer_beside] = 0;
      }
      if (w.event != Event::None) {
        Event event = w.event;
        w.event = Event::None;
        if (event == Event::Block) {  // the instruction counts when the warp has passed it
          --warp_counts[pc];
          thread_counts[pc] -= uint64_t(__builtin_popcount(mask));
        }
        if (event == Event::Stop || stopped) break;
        if (w.active == 0) {
          if (!w.choose()) break;
          continue;
        }
      } else {
        ++w.pc;
      }
    } else {
      ++w.pc;
    }
    if (w.pc >= w.next_pc) w.choose();
  }
  if (fair && w.active) w.choose();
  w.full_turns = !fair && executed == quantum && w.next_pc != kNone ? w.full_turns + 1 : 0;
  instructions += executed;
  quiet = wrote ? 0 : quiet + executed;
  if (instructions > config.budget && !stopped) report_budget(w);
  return true;
}

void Launch::run_block() {
  for (;;) {
    bool ran = false, all_done = true;
    for (Warp& w : block.warps) {
      if (w.finished()) continue;
      all_done = false;
      ran = step(w, kTurn) || ran;
      if (stopped) return;
    }
    if (all_done) return;
    if (!ran) {
      report_deadlock();
      return stop();
    }
  }
}

void Launch::run() {
  for (uint32_t z = 0; z < config.grid[2] && !stopped; ++z)
    for (uint32_t y = 0; y < config.grid[1] && !stopped; ++y)
      for (uint32_t x = 0; x < config.grid[0] && !stopped; ++x) {
        block.id = {x, y, z};
        start_block();
        run_block();
        block.races.settle();
        global_races.settle();
        report_unwritten(block);
      }
}

}  // namespace gpt2fast::ptx
