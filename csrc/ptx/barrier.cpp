// bar.sync, bar.arrive, bar.red and their barrier.* forms; bar.warp.sync; the report of a deadlock.
#include "barrier.h"

#include <algorithm>

#include "decode.h"

namespace gpt2fast::ptx {
namespace {

enum Mode : uint8_t { kSync, kArrive, kPopc, kAnd, kOr };
enum Operands : uint8_t { kHasCount = 1, kNegated = 2 };

// operand: [result] id [count] [predicate]
uint32_t result_operands(const Instruction& i) { return i.mode[0] >= kPopc ? 1 : 0; }

void release(Block& block, uint32_t id) {
  BarrierState& b = block.barriers[id];
  Launch& launch = *block.launch;
  uint32_t total = b.expected;
  for (uint32_t index : b.waiting) {
    Warp& w = block.warps[index];
    for (Group& g : w.groups) {
      if (g.state != Group::AtBarrier || g.barrier != id) continue;
      const Instruction& ins = launch.module.code[g.pc];
      if (ins.mode[0] == kPopc) each(g.mask, w.lanes<uint32_t>(ins.operand[0]), [&](int) { return b.count_true; });
      if (ins.mode[0] == kAnd) set_predicate(w.predicate(ins.operand[0]), g.mask, b.count_true == total ? kAllLanes : 0);
      if (ins.mode[0] == kOr) set_predicate(w.predicate(ins.operand[0]), g.mask, b.count_true ? kAllLanes : 0);
      ++launch.warp_counts[g.pc];
      launch.thread_counts[g.pc] += uint64_t(__builtin_popcount(g.mask));
      g.state = Group::Ready;
      ++g.pc;
      w.next_pc = std::min(w.next_pc, g.pc);
    }
    w.diverged.clear();
  }
  order_warps(block, b.arrivers, b.waiting);
  ++launch.barriers;
  b = {};
}

void arrive(Warp& w, uint32_t id, uint32_t threads, bool waits) {
  BarrierState& b = w.block->barriers[id];
  b.arrived += threads;
  b.arrivers.push_back(w.index);
  if (waits) b.waiting.push_back(w.index);
  if (b.arrived >= b.expected) release(*w.block, id);
}

void barrier(Warp& w, const Instruction& i, uint32_t mask) {
  uint32_t at = result_operands(i);
  uint32_t id = w.lanes<uint32_t>(i.operand[at])[__builtin_ctz(mask)];
  if (id >= 16) {
    w.launch->report("barrier", "barrier " + std::to_string(id) + " does not exist: there are 16", w, w.pc, __builtin_ctz(mask));
    w.launch->stop();
    return;
  }
  BarrierState& b = w.block->barriers[id];
  bool counted = i.mode[1] & kHasCount;
  uint32_t expected = counted ? w.lanes<uint32_t>(i.operand[at + 1])[__builtin_ctz(mask)] : w.launch->threads;
  if (b.arrived == 0) b.expected = expected;
  if (b.arrived && b.expected != expected) {
    w.launch->report("barrier", "barrier " + std::to_string(id) + " is waited for by " + std::to_string(b.expected) + " and by " +
                     std::to_string(expected) + " threads", w, w.pc, __builtin_ctz(mask), b.pc);
  }
  b.pc = w.pc;
  if (i.mode[0] >= kPopc) {
    uint32_t p = w.predicate(i.operand[at + 1 + uint32_t(counted)]);
    b.count_true += uint32_t(__builtin_popcount((i.mode[1] & kNegated ? ~p : p) & mask));
  }
  if (i.mode[0] == kArrive) return arrive(w, id, counted && mask == w.live() ? kLanes : uint32_t(__builtin_popcount(mask)), false);
  w.park(Group::AtBarrier, id);
  settle_barrier(w);
}

void warp_barrier(Warp& w, const Instruction& i, uint32_t mask) {
  uint32_t members = w.lanes<uint32_t>(i.operand[0])[__builtin_ctz(mask)];
  if ((members & w.present & ~w.exited & ~mask) == 0) {
    w.diverged.clear();
    return;
  }
  // Other places of bar.warp.sync with these members count too.
  uint32_t together = mask;
  for (const Group& g : w.groups)
    if (g.state == Group::AtWarp && g.barrier == members && w.launch->module.code[g.pc].run == warp_barrier) together |= g.mask;
  if ((members & w.present & ~w.exited & ~together) == 0) {
    for (Group& g : w.groups) {
      if (g.state != Group::AtWarp || g.barrier != members || w.launch->module.code[g.pc].run != warp_barrier) continue;
      ++w.launch->warp_counts[g.pc];
      w.launch->thread_counts[g.pc] += uint64_t(__builtin_popcount(g.mask));
      g.state = Group::Ready;
      ++g.pc;
      w.next_pc = std::min(w.next_pc, g.pc);
    }
    w.diverged.clear();
    return;
  }
  w.park(Group::AtWarp, members);
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
  d.take("aligned");
  if (what == 2) {
    int op = d.choose({"popc", "and", "or"});
    if (op < 0) d.fail("expected .popc, .and or .or");
    d.take("aligned");
    d.ins.mode[0] = uint8_t(kPopc + op);
    if (op == 0) d.type({Type::U32}), d.write(Type::U32);
    else d.type({Type::Pred}), d.write_predicate();
  }
  d.read(Type::B32);
  size_t predicate = what == 2 ? 1 : 0;
  if (d.left() > predicate) {
    d.read(Type::B32);
    d.ins.mode[1] |= kHasCount;
  }
  if (what == 2 && d.read_predicate()) d.ins.mode[1] |= kNegated;
  d.ins.run = barrier;
}

std::string where(const Warp& w) {
  std::string s = "warp " + std::to_string(w.index);
  if (w.finished()) return s + " has exited";
  bool first = true;
  for (const Group& g : w.groups) {
    int lanes = __builtin_popcount(g.mask);
    s += (first ? ": " : ", ") + (lanes == kLanes ? std::string() : std::to_string(lanes) + " lanes ") + "at " + w.launch->place(g.pc) + " '" +
         w.launch->module.text_of(w.launch->module.code[g.pc]) + "'";
    first = false;
  }
  if (w.exited) s += ", " + std::to_string(__builtin_popcount(w.exited)) + " lanes have exited";
  return s;
}

}  // namespace

void order_warps(Block& block, const std::vector<uint32_t>& arrivers, const std::vector<uint32_t>& waiters) {
  std::vector<uint32_t> joined(block.warps.size(), 0);
  for (uint32_t a : arrivers)
    for (size_t v = 0; v < joined.size(); ++v) joined[v] = std::max(joined[v], block.warps[a].clock[v]);
  for (uint32_t waiter : waiters) {
    std::vector<uint32_t>& clock = block.warps[waiter].clock;
    for (size_t v = 0; v < joined.size(); ++v) clock[v] = std::max(clock[v], joined[v]);
  }
  for (uint32_t a : arrivers) ++block.warps[a].clock[a];
}

void settle_barrier(Warp& w) {
  uint32_t id = kNone, lanes = 0;
  for (const Group& g : w.groups) {
    if (g.state != Group::AtBarrier || (id != kNone && g.barrier != id)) return;
    id = g.barrier;
    lanes |= g.mask;
  }
  if (id == kNone || lanes != w.live()) return;
  const BarrierState& b = w.block->barriers[id];
  if (std::find(b.waiting.begin(), b.waiting.end(), w.index) != b.waiting.end()) return;
  bool counted = w.launch->module.code[w.groups.front().pc].mode[1] & kHasCount;
  arrive(w, id, counted ? kLanes : uint32_t(__builtin_popcount(lanes)), true);
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
