// Races in shared memory: see race.h.
#include "race.h"

#include <algorithm>
#include <cstring>

#include "clones.h"
#include "machine.h"

namespace gpt2fast::ptx {
namespace {

constexpr uint8_t kMany = kLanes;            // instead of a lane: several lanes
constexpr uint32_t kInFlight = 0xffffffffu;  // the stamp of a cp.async that nobody has waited for yet

const char* verb(bool write, bool atomic) { return atomic ? "atomic operation" : write ? "write" : "read"; }

}  // namespace

void Races::report_pair(Warp& w, uint32_t pc, int lane, size_t cell, uint64_t offset, Use use, const Writer& other,
                        const char* other_verb) {
  raced_[cell] = 1;
  if (w.launch->repeats("race", pc, other.pc)) return;
  std::string message = std::string("shared memory ") + verb(use != Use::Read, use == Use::Atomic) + " at byte " +
                        std::to_string(offset) + " by warp " + std::to_string(w.index) + " and " + other_verb + " by " +
                        (other.warp == w.index ? "other lanes of it" : "warp " + std::to_string(other.warp)) + " at " +
                        w.launch->place(other.pc) + " with no " + (other.warp == w.index ? "__syncwarp" : "barrier") +
                        " between them";
  w.launch->report("race", message, w, pc, lane, other.pc);
}

void Races::report_in_flight(Warp& w, int lane, size_t cell, uint64_t offset, const char* what) {
  uint32_t copy = writer_[cell].pc;
  raced_[cell] = 1;
  if (w.launch->repeats("race", w.pc, copy)) return;
  std::string message = "shared memory at byte " + std::to_string(offset) + what + " while the cp.async at " +
                        w.launch->place(copy) + " has not been waited for";
  w.launch->report("race", message, w, w.pc, lane, copy);
}

uint32_t Races::content(size_t cell) const {
  uint32_t value = 0;
  std::memcpy(&value, memory_ + (cell << shift_), size_t{1} << shift_);
  return value;
}

void Races::settle() {
  for (const Suspect& s : suspects_) {
    if (content(s.cell) == s.content) continue;
    report_pair(*s.warp, s.pc, s.lane, s.cell, s.offset, Use::Write, s.writer, verb(true, false));
  }
  suspects_.clear();
}

void Races::resize(const uint8_t* memory, size_t bytes, int grain_shift, uint32_t warps) {
  memory_ = memory;
  shift_ = grain_shift;
  warps_ = warps;
  cells_ = (bytes >> shift_) + 1;
  written_.assign(cells_, 0);
  read_.assign(cells_, 0);
  writer_.assign(cells_, {kNone, 0, false});
  raced_.assign(cells_, 0);
  read_stamp_.assign(cells_ * warps, 0);
  read_pc_.assign(cells_ * warps, kNone);
  lane_wrote_at_.assign(cells_, 0);
  lane_wrote_.assign(cells_, kMany);
  lane_read_at_.assign(cells_ * warps, 0);
  lane_read_.assign(cells_ * warps, kMany);
}

// Everything that the last block did is ordered before this block, so that its stamps are forgotten.
void Races::start_block() {
  std::fill(written_.begin(), written_.end(), 0);
  std::fill(read_.begin(), read_.end(), 0);
  std::fill(raced_.begin(), raced_.end(), uint8_t{0});
  std::fill(read_stamp_.begin(), read_stamp_.end(), 0);
  now_ = 0;
  std::fill(lane_wrote_at_.begin(), lane_wrote_at_.end(), 0);
  std::fill(lane_read_at_.begin(), lane_read_at_.end(), 0);
}

void Races::meet(Warp& w, uint32_t lanes) {
  for_lanes(lanes, [&](int l) { w.met_at[l] = now_; });
}

bool Races::found(uint64_t offset, uint32_t bytes) const {
  auto [first, last] = cells(offset, bytes);
  for (size_t cell = first; cell <= last; ++cell)
    if (raced_[cell]) return true;
  return false;
}

// The fast path. It notes accesses to cells where no race is possible, because everything done there lies before the
// warp's horizon. Returns the other lanes.
template <int kCells>
PTX_CLONES uint32_t Races::check_ordered(Warp& w, uint32_t mask, const uint64_t* offset, Use use) {
  uint32_t horizon = w.horizon, stamp = w.clock[w.index], pc = w.pc, now = now_, left = 0;
  bool reads = use == Use::Read;
  Writer writer{pc, uint16_t(w.index), use == Use::Atomic};
  size_t of_warp = cells_ * w.index;
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    size_t first = offset[lane] >> shift_;
    uint32_t latest = 0, met_at = w.met_at[lane];
    uint8_t conflict = 0;
    for (int c = 0; c < kCells; ++c) latest = std::max(latest, written_[first + size_t(c)]);
    if (!reads)
      for (int c = 0; c < kCells; ++c) latest = std::max(latest, read_[first + size_t(c)]);
    for (int c = 0; c < kCells; ++c)
      conflict |= (lane_wrote_at_[first + size_t(c)] > met_at) & (lane_wrote_[first + size_t(c)] != lane);
    if (!reads)
      for (int c = 0; c < kCells; ++c)
        conflict |=
            (lane_read_at_[of_warp + first + size_t(c)] > met_at) & (lane_read_[of_warp + first + size_t(c)] != lane);
    if (latest > horizon || conflict) {
      left |= 1u << lane;
    } else if (reads) {
      for (int c = 0; c < kCells; ++c) read_[first + size_t(c)] = std::max(read_[first + size_t(c)], stamp);
      for (int c = 0; c < kCells; ++c) read_stamp_[of_warp + first + size_t(c)] = stamp;
      for (int c = 0; c < kCells; ++c) read_pc_[of_warp + first + size_t(c)] = pc;
      for (int c = 0; c < kCells; ++c) {
        size_t at = of_warp + first + size_t(c);
        lane_read_[at] = lane_read_at_[at] > met_at && lane_read_[at] != lane ? kMany : uint8_t(lane);
        lane_read_at_[at] = now;
      }
    } else {
      for (int c = 0; c < kCells; ++c) written_[first + size_t(c)] = stamp;
      for (int c = 0; c < kCells; ++c) writer_[first + size_t(c)] = writer;
      for (int c = 0; c < kCells; ++c) lane_wrote_[first + size_t(c)] = uint8_t(lane);
      for (int c = 0; c < kCells; ++c) lane_wrote_at_[first + size_t(c)] = now;
    }
  }
  return left;
}

void Races::check(Warp& w, uint32_t mask, const uint64_t* offset, uint32_t bytes, Use use, bool copy) {
  settle();
  uint32_t left = mask;
  ++now_;
  if (!copy) {
    switch (bytes >> shift_) {
      case 1:
        left = check_ordered<1>(w, mask, offset, use);
        break;
      case 2:
        left = check_ordered<2>(w, mask, offset, use);
        break;
      case 4:
        left = check_ordered<4>(w, mask, offset, use);
        break;
      case 8:
        left = check_ordered<8>(w, mask, offset, use);
        break;
      case 16:
        left = check_ordered<16>(w, mask, offset, use);
        break;
      default:
        break;
    }
  }
  for_lanes(left, [&](int l) { check_lane(w, l, offset[l], bytes, use, copy); });
}

void Races::check_lane(Warp& w, int lane, uint64_t offset, uint32_t bytes, Use use, bool copy) {
  uint32_t self = w.index, stamp = w.clock[self];
  bool atomic = use == Use::Atomic;
  auto [first, last] = cells(offset, bytes);
  for (size_t cell = first; cell <= last; ++cell) {
    const Writer writer = writer_[cell];
    if (!copy) check_lanes(w, lane, cell, offset, use);
    if (written_[cell] == kInFlight) {
      report_in_flight(w, lane, cell, offset,
                       copy               ? " is written by cp.async"
                       : use == Use::Read ? " is read"
                                          : " is written");
    } else if (writer.warp != self && written_[cell] > w.clock[writer.warp] && !(atomic && writer.atomic)) {
      if (use == Use::Write && !writer.atomic && !copy)
        suspects_.push_back({&w, lane, cell, offset, w.pc, writer, content(cell)});
      else
        report_pair(w, w.pc, lane, cell, offset, use, writer, verb(true, writer.atomic));
    }
    if (use == Use::Read) {
      read_[cell] = std::max(read_[cell], stamp);
      read_stamp_[cells_ * self + cell] = stamp;
      read_pc_[cells_ * self + cell] = w.pc;
    } else {
      for (uint32_t v = 0; v < warps_; ++v)
        if (v != self && read_stamp_[cells_ * v + cell] > w.clock[v])
          report_pair(w, w.pc, lane, cell, offset, use, {read_pc_[cells_ * v + cell], uint16_t(v), false}, "read");
      if (copy || written_[cell] != kInFlight) {
        written_[cell] = copy ? kInFlight : stamp;
        writer_[cell] = {w.pc, uint16_t(self), atomic};
      }
    }
    if (copy)
      lane_wrote_at_[cell] = 0;  // accesses before the copy is waited for are reported by report_in_flight
    else
      note_lane(w, lane, cell, use);
  }
}

// Looks for a conflict between lanes since this lane last met others: another lane's write, or another lane's read if
// this lane writes. If one instruction writes one place from several lanes, that is no conflict: one of them wins.
void Races::check_lanes(Warp& w, int lane, size_t cell, uint64_t offset, Use use) {
  const Writer writer = writer_[cell];
  uint32_t met_at = w.met_at[lane], wrote_at = lane_wrote_at_[cell];
  if (writer.warp == w.index && wrote_at > met_at && wrote_at != now_ && lane_wrote_[cell] != lane &&
      !(use == Use::Atomic && writer.atomic)) {
    if (use == Use::Write && !writer.atomic)
      suspects_.push_back({&w, lane, cell, offset, w.pc, writer, content(cell)});
    else
      report_pair(w, w.pc, lane, cell, offset, use, writer, verb(true, writer.atomic));
  }
  size_t of_warp = cells_ * w.index + cell;
  if (use != Use::Read && lane_read_at_[of_warp] > met_at && lane_read_[of_warp] != lane)
    report_pair(w, w.pc, lane, cell, offset, use, {read_pc_[of_warp], uint16_t(w.index), false}, "read");
}

void Races::note_lane(Warp& w, int lane, size_t cell, Use use) {
  if (use != Use::Read) {
    lane_wrote_[cell] = uint8_t(lane);
    lane_wrote_at_[cell] = now_;
    return;
  }
  size_t at = cells_ * w.index + cell;
  lane_read_[at] = lane_read_at_[at] > w.met_at[lane] && lane_read_[at] != lane ? kMany : uint8_t(lane);
  lane_read_at_[at] = now_;
}

void Races::land(Warp& w, uint32_t pc, uint64_t offset, uint32_t bytes) {
  auto [first, last] = cells(offset, bytes);
  for (size_t cell = first; cell <= last; ++cell) {
    if (written_[cell] == kInFlight && writer_[cell].pc != pc) continue;  // another copy is still in flight there
    written_[cell] = w.clock[w.index];
    writer_[cell] = {pc, uint16_t(w.index), false};
  }
}

}  // namespace gpt2fast::ptx
