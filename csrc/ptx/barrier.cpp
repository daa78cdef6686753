// bar.sync, bar.arrive and bar.red, with their barrier.* forms; bar.warp.sync; and the report of a deadlock.
#include "barrier.h"

#include <algorithm>

#include "decode.h"

namespace gpt2fast::ptx {
namespace {

enum Mode : uint8_t { kSync, kArrive, kPopc, kAnd, kOr };
enum Flags : uint8_t { kHasCount = 1, kNegated = 2, kAligned = 4 };

// A group that has waited continues after the barrier. The barrier counts as executed now.
void pass(Warp& w, Group& g) {
  ++w.launch->warp_counts[g.pc];
  w.launch->thread_counts[g.pc] += uint64_t(__builtin_popcount(g.mask));
  g.state = Group::Ready;
  ++g.pc;
  w.next_pc = std::min(w.next_pc, g.pc);
}

// From now on, everything that the warp does is ordered after what the others did up to these times.
void come_after(Warp& w, const std::vector<uint32_t>& clock) {
  uint32_t horizon = kNone - 1;
  for (size_t v = 0; v < clock.size(); ++v) {
    w.clock[v] = std::max(w.clock[v], clock[v]);
    if (v != w.index) horizon = std::min(horizon, w.clock[v]);
  }
  w.horizon = horizon;
}

void release(Block& block, uint32_t id) {
  BarrierState& b = block.barriers[id];
  Launch& launch = *block.launch;
  for (uint32_t index : b.waiting) {
    Warp& w = block.warps[index];
    for (Group& g : w.groups) {
      if (g.state != Group::AtBarrier || g.barrier != id) continue;
      const Instruction& ins = launch.module.code[g.pc];
      if (ins.mode[0] == kPopc) each(g.mask, w.lanes<uint32_t>(ins.operand[0]), [&](int) { return b.count_true; });
      if (ins.mode[0] == kAnd)
        set_predicate(w.predicate(ins.operand[0]), g.mask, b.count_true == b.voters ? kAllLanes : 0);
      if (ins.mode[0] == kOr) set_predicate(w.predicate(ins.operand[0]), g.mask, b.count_true ? kAllLanes : 0);
      pass(w, g);
    }
    block.races.meet(w, kAllLanes);
    come_after(w, b.clock);
  }
  b = {};
}

// Releases a barrier if all threads have arrived. Threads that have exited count as arrived, unless the instruction
// gives a number of threads.
void complete(Block& block, uint32_t id) {
  BarrierState& b = block.barriers[id];
  uint32_t gone = 0;
  if (!b.counted)
    for (const Warp& w : block.warps) gone += uint32_t(__builtin_popcount(w.exited));
  if (b.arrived + gone < b.expected) return;
  if (b.arrived < b.expected)
    block.launch->note(
        "exited_before_barrier",
        std::to_string(b.expected - b.arrived) +
            " threads have exited without coming to this barrier, and count as arrived: GPUs since Volta "
            "let the rest go on, but CUDA promises it for none",
        block.warps[b.waiting.empty() ? 0 : b.waiting.front()], b.pc);
  release(block, id);
}

// A warp arrives with `threads` threads. Where the instruction gives a count, PTX counts each warp as 32 threads.
void arrive(Warp& w, uint32_t id, uint32_t threads, bool waits) {
  BarrierState& b = w.block->barriers[id];
  ++w.launch->barriers;
  b.arrived += threads;
  b.clock.resize(w.clock.size());
  for (size_t v = 0; v < w.clock.size(); ++v) b.clock[v] = std::max(b.clock[v], w.clock[v]);
  ++w.clock[w.index];
  if (waits) b.waiting.push_back(w.index);
  complete(*w.block, id);
}

// operand: [result] id [count] [predicate]
void barrier(Warp& w, const Instruction& i, uint32_t mask) {
  uint32_t at = i.mode[0] >= kPopc ? 1 : 0;
  int lane = __builtin_ctz(mask);
  uint32_t id = w.lanes<uint32_t>(i.operand[at])[lane];
  if (id >= 16) {
    w.refuse("barrier " + std::to_string(id) + " does not exist: there are 16", mask);
    return;
  }
  BarrierState& b = w.block->barriers[id];
  bool counted = i.mode[1] & kHasCount;
  uint32_t expected = counted ? w.lanes<uint32_t>(i.operand[at + 1])[lane] : w.launch->threads;
  if (counted && (expected == 0 || expected % kLanes)) {
    w.refuse("the thread count of a barrier is a multiple of 32, got " + std::to_string(expected), mask);
    return;
  }
  if (b.arrived == 0) b.expected = expected, b.counted = counted;
  if (b.expected != expected)
    w.launch->report("barrier",
                     "barrier " + std::to_string(id) + " expects " + std::to_string(expected) + " threads here and " +
                         std::to_string(b.expected) + " at " + w.launch->place(b.pc),
                     w, w.pc, lane, b.pc);
  b.pc = w.pc;
  if (i.mode[0] >= kPopc) {
    uint32_t p = w.predicate(i.operand[at + 1 + uint32_t(counted)]);
    b.count_true += uint32_t(__builtin_popcount((i.mode[1] & kNegated ? ~p : p) & mask));
    b.voters += uint32_t(__builtin_popcount(mask));
  }
  if (i.mode[0] == kArrive) return arrive(w, id, mask == w.live() ? kLanes : uint32_t(__builtin_popcount(mask)), false);
  w.park(Group::AtBarrier, id);
  settle_barrier(w);
}

// bar.warp.sync. Lanes may wait for each other at different places in the program.
void warp_barrier(Warp& w, const Instruction& i, uint32_t mask) {
  const auto* given = w.lanes<uint32_t>(i.operand[0]);
  uint32_t members = given[__builtin_ctz(mask)];
  uint32_t others = mask & ballot([=](int l) { return given[l] != members; });
  if (others) {  // lanes with other member masks execute this later, as teams of their own
    w.split_team(others);
    mask &= ~others;
  }
  if (mask & ~members) {
    w.refuse("a lane executes bar.warp.sync without being in its member mask", mask & ~members);
    return;
  }
  auto waits = [&](const Group& g) {
    return g.state == Group::AtWarp && g.barrier == members && w.launch->module.code[g.pc].run == warp_barrier;
  };
  uint32_t together = mask;
  for (const Group& g : w.groups)
    if (waits(g)) together |= g.mask;
  if (members & w.live() & ~together) return w.park(Group::AtWarp, members);
  for (Group& g : w.groups)
    if (waits(g)) pass(w, g);
  w.block->races.meet(w, members);
}

void decode_barrier(Decoder& d, bool aligned) {
  d.ins.kind = Class::Control;
  d.ins.sync = true;
  d.take("cta");
  if (aligned && d.take("warp")) {
    if (!d.take("sync")) d.fail("expected bar.warp.sync");
    d.read(Type::B32);
    d.ins.run = warp_barrier;
    return;
  }
  int what = d.choose({"sync", "arrive", "red"});
  if (what < 0) d.fail("expected .sync, .arrive or .red");
  d.ins.mode[0] = uint8_t(what);
  if (d.take("aligned") || aligned) d.ins.mode[1] |= kAligned;
  if (what == 2) {
    int op = d.choose({"popc", "and", "or"});
    if (op < 0) d.fail("expected .popc, .and or .or");
    if (d.take("aligned")) d.ins.mode[1] |= kAligned;
    d.ins.mode[0] = uint8_t(kPopc + op);
    if (op == 0)
      d.type({Type::U32}), d.write(Type::U32);
    else
      d.type({Type::Pred}), d.write_predicate();
  }
  d.read(Type::B32);
  size_t predicate = what == 2 ? 1 : 0;
  if (d.left() > predicate) {
    d.read(Type::B32);
    d.ins.mode[1] |= kHasCount;
  } else if (what == kArrive) {
    d.fail("an arrival needs a number of threads");
  }
  if (predicate && d.read_predicate()) d.ins.mode[1] |= kNegated;
  d.ins.run = barrier;
}

std::string where(const Warp& w) {
  std::string s = "warp " + std::to_string(w.index);
  if (w.finished()) return s + " has exited";
  bool first = true;
  for (const Group& g : w.groups) {
    int lanes = __builtin_popcount(g.mask);
    s += (first ? ": " : ", ") + (lanes == kLanes ? std::string() : std::to_string(lanes) + " lanes ") + "at " +
         w.launch->place(g.pc) + " '" + w.launch->module.text_of(w.launch->module.code[g.pc]) + "'";
    first = false;
  }
  if (w.exited) s += ", " + std::to_string(__builtin_popcount(w.exited)) + " lanes have exited";
  return s;
}

}  // namespace

void settle_barrier(Warp& w) {
  uint32_t id = kNone, lanes = 0;
  for (const Group& g : w.groups) {
    if (g.state != Group::AtBarrier || (id != kNone && g.barrier != id)) return;
    id = g.barrier;
    lanes |= g.mask;
  }
  if (id == kNone || lanes != w.live()) return;
  const Group &first = w.groups.front(), &last = w.groups.back();
  auto aligned = [&](const Group& g) { return w.launch->module.code[g.pc].mode[1] & kAligned; };
  if (first.pc != last.pc && (aligned(first) || aligned(last)))
    w.launch->report(
        "barrier",
        "lanes of one warp wait at different barrier instructions; the others at " + w.launch->place(last.pc), w,
        first.pc, __builtin_ctz(first.mask), last.pc);
  const BarrierState& b = w.block->barriers[id];
  if (std::find(b.waiting.begin(), b.waiting.end(), w.index) != b.waiting.end()) return;
  bool counted = w.launch->module.code[w.groups.front().pc].mode[1] & kHasCount;
  arrive(w, id, counted ? kLanes : uint32_t(__builtin_popcount(lanes)), true);
}

void count_exited(Block& block) {
  for (uint32_t id = 0; id < 16; ++id)
    if (block.barriers[id].arrived) complete(block, id);
}

void Launch::report_deadlock() {
  std::string message = "deadlock, nothing can go on:";
  const Warp* waiting = nullptr;
  uint32_t pc = kNone;
  for (const Warp& w : block.warps) {
    message += (w.index ? "; " : " ") + where(w);
    for (const Group& g : w.groups) {
      if (!waiting) waiting = &w, pc = g.pc;
    }
  }
  report("deadlock", message, *waiting, pc, -1);
}

void add_barrier(Opcodes& table) {
  table["bar"] = [](Decoder& d) { decode_barrier(d, true); };
  table["barrier"] = [](Decoder& d) { decode_barrier(d, false); };
}

}  // namespace gpt2fast::ptx
