// The groups of lanes of a warp: how they diverge, wait and meet again.
#include <algorithm>

#include "machine.h"

namespace gpt2fast::ptx {

void Warp::split(uint32_t mask, uint32_t target) {
  active &= ~mask;
  for (Group& g : groups) {
    if (g.state == Group::Ready && g.pc == target) {
      g.mask |= mask;
      return;
    }
  }
  Group g;
  g.pc = target;
  g.mask = mask;
  groups.push_back(g);
  next_pc = std::min(next_pc, target);
}

void Warp::split_team(uint32_t mask) {
  launch->thread_counts[pc] -= uint64_t(__builtin_popcount(mask));  // they count when they execute it later
  split(mask, pc);
}

void Warp::park(Group::State state, uint32_t barrier) {
  event = Event::Block;
  for (Group& g : groups) {
    if (g.state == state && g.pc == pc && g.barrier == barrier) {
      g.mask |= active;
      active = 0;
      return;
    }
  }
  Group g;
  g.pc = pc;
  g.mask = active;
  g.state = state;
  g.barrier = barrier;
  groups.push_back(g);
  active = 0;
}

bool Warp::choose() {
  if (active) split(active, pc);
  size_t best = groups.size();
  for (size_t i = 0; i < groups.size(); ++i)
    if (groups[i].state == Group::Ready && (best == groups.size() || groups[i].pc < groups[best].pc)) best = i;
  next_pc = kNone;
  if (best == groups.size()) return false;
  pc = groups[best].pc;
  for (size_t i = 0; i < groups.size();) {
    if (groups[i].state == Group::Ready && groups[i].pc == pc) {
      active |= groups[i].mask;
      groups.erase(groups.begin() + long(i));
    } else {
      if (groups[i].state == Group::Ready) next_pc = std::min(next_pc, groups[i].pc);
      ++i;
    }
  }
  return true;
}

// Lanes that spin at a low program counter may be waiting for other lanes of their warp. So the others get a turn now
// and then.
bool Warp::choose_others() {
  choose();
  size_t last = groups.size();
  for (size_t i = 0; i < groups.size(); ++i)
    if (groups[i].state == Group::Ready && (last == groups.size() || groups[i].pc > groups[last].pc)) last = i;
  if (last == groups.size()) return active != 0;
  Group chosen = groups[last];
  groups.erase(groups.begin() + long(last));
  split(active, pc);
  pc = chosen.pc;
  active = chosen.mask;
  next_pc = kNone;  // no other group takes over before the turn ends
  return true;
}

void Warp::exit(uint32_t mask) {
  exited |= mask;
  active &= ~mask;
  // Groups that wait for these lanes check again whether they must wait.
  for (Group& g : groups)
    if (g.state == Group::AtWarp) g.state = Group::Ready;
}

// Reports an error after which nothing sensible can follow, and stops the launch.
bool Warp::refuse(const std::string& why, uint32_t mask) {
  launch->report("warp", why, *this, pc, __builtin_ctz(mask));
  launch->stop();
  event = Event::Stop;
  return false;
}

bool Warp::gather(uint32_t members, uint32_t mask) {
  uint32_t outside = mask & ~members;
  if (outside)
    return refuse("lane " + std::to_string(__builtin_ctz(outside)) + " executes this without being in its member mask",
                  outside);
  uint32_t needed = members & live();
  if ((needed & ~mask) == 0) return true;
  uint32_t together = mask;
  for (const Group& g : groups)
    if (g.state == Group::AtWarp && g.pc == pc) together |= g.mask;
  if (needed & ~together) {
    park(Group::AtWarp, members);
    return false;
  }
  // All lanes are here: they execute this instruction again, as one group.
  for (Group& g : groups)
    if (g.state == Group::AtWarp && g.pc == pc) g.state = Group::Ready;
  next_pc = pc;
  event = Event::Block;
  return false;
}

bool Warp::gather_all(uint32_t mask) {
  if (mask == kAllLanes) return true;
  if (live() == kAllLanes) return gather(kAllLanes, mask);
  std::string why = "all 32 lanes of a warp must execute this together, but lane ";
  uint32_t gone = exited;
  if (gone) return refuse(why + std::to_string(__builtin_ctz(gone)) + " has exited", mask);
  return refuse(why + std::to_string(__builtin_ctz(~present)) + " does not exist: the block's last warp is not full",
                mask);
}

}  // namespace gpt2fast::ptx
