// Races in global memory: see global_race.h.
#include "global_race.h"

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace gpt2fast::ptx {
namespace {

constexpr int kPageShift = 12;             // a page has 2^12 cells
constexpr size_t kMostAccesses = 1 << 24;  // above that, a new block forgets what was before it
constexpr uint32_t kMostNumbers = 1u << 31;
constexpr size_t kMostPages = 1024;  // so many pages, 64 MiB, are kept from launch to launch

const char* verb(Use use) { return use == Use::Read ? "read" : use == Use::Write ? "write" : "atomic operation"; }

bool has(const std::vector<uint64_t>& bits, uint32_t i) { return i / 64 < bits.size() && bits[i / 64] >> i % 64 & 1; }

std::string name(const Launch& launch, uint32_t block) {
  const auto& grid = launch.config.grid;
  return "block (" + std::to_string(block % grid[0]) + ", " + std::to_string(block / grid[0] % grid[1]) + ", " +
         std::to_string(block / grid[0] / grid[1]) + ")";
}

}  // namespace

GlobalRaces::Pool& GlobalRaces::pool() {
  static thread_local Pool pool;
  return pool;
}

GlobalRaces::~GlobalRaces() {
  if (!on()) return;
  Pool& p = pool();
  p.next = base_ + uint32_t(accesses_.size());
  for (Shadow& s : shadows_)
    for (auto& page : s.pages)
      if (page && p.pages.size() < kMostPages) p.pages.push_back(std::move(page));
}

void GlobalRaces::start(size_t buffers, size_t instructions, int grain_shift, uint32_t warps, bool same_value) {
  shadows_.resize(buffers);
  base_ = pool().next;
  last_access_.resize(instructions);
  forget();
  shift_ = grain_shift;
  warps_ = warps;
  same_value_ = same_value;
}

// Forgets all accesses so far: they count as ordered before everything that follows.
void GlobalRaces::forget() {
  base_ += uint32_t(accesses_.size());
  if (base_ > kMostNumbers) {
    base_ = 0;
    pool().pages.clear();
    for (Shadow& s : shadows_) s = {};
  }
  accesses_.assign(1, {});
  std::fill(last_access_.begin(), last_access_.end(), 0);
}

void GlobalRaces::start_block(uint32_t block) {
  block_ = block;
  joined_.clear();
  snapshot_ = last_joined_ = nullptr;
  fenced_.assign(warps_, 0);
  fenced_here_.assign(warps_, 0);
  any_fence_ = false;
  if (accesses_.size() > kMostAccesses) forget();
}

uint32_t GlobalRaces::note(const Warp& w, const Instruction& ins, Use use) {
  uint32_t& last = last_access_[w.pc];  // its place in accesses_
  const Access& known = accesses_[last];
  uint32_t stamp = w.clock[w.index];
  if (!last || known.block != block_ || known.warp != w.index || known.stamp != stamp) {
    last = uint32_t(accesses_.size());
    accesses_.push_back({block_, stamp, w.pc, uint16_t(w.index), ins.order, use});
  }
  return base_ + last;
}

GlobalRaces::Cell* GlobalRaces::page(Shadow& shadow, uint64_t number) {
  std::unique_ptr<Cell[]>& page = shadow.pages[number - shadow.first_page];
  std::vector<std::unique_ptr<Cell[]>>& free = pool().pages;
  if (!page && !free.empty()) {
    page = std::move(free.back());
    free.pop_back();
  }
  if (!page) page = std::make_unique<Cell[]>(size_t{1} << kPageShift);
  return page.get();
}

// Whether what another warp did comes before what this warp does now.
bool GlobalRaces::ordered(const Warp& w, const Access& other) const {
  if (other.block == block_) return other.warp == w.index || other.stamp <= w.clock[other.warp];
  return has(joined_, other.block) && other.stamp <= published_[other.block][other.warp];
}

// Two accesses that are both strong (atomic, volatile, relaxed, ...) never race if the scope of each includes the
// other's block. All others race unless they are ordered.
bool GlobalRaces::fine(const Warp& w, const Access& self, uint32_t index) {
  const Access& other = at(index);
  uint8_t both = self.order & other.order;
  if ((both & kStrong) && (other.block == block_ || !((self.order | other.order) & kBlockOnly))) return true;
  return ordered(w, other);
}

// If there are fewer elements than threads, Triton lets several warps load the same elements, and one of these warps
// stores the results. The other warps may load before or after that store; nothing uses what they loaded. So a load
// does not race with the store if the storing warp has executed the same load instruction too.
bool GlobalRaces::replicated(const Warp& w, const Cell& c, uint32_t pc, bool by_self) const {
  for (uint32_t reader : {c.reader, c.other_warp}) {
    if (reader <= base_) continue;
    const Access& r = at(reader);
    if (r.block == block_ && r.pc == pc && (!by_self || r.warp == w.index)) return true;
  }
  return false;
}

template <bool kReads>
void GlobalRaces::check_lanes(Warp& w, uint32_t self, uint32_t buffer, uint32_t mask, const uint64_t* address,
                              uint32_t bytes) {
  const Access access = at(self);
  Shadow& shadow = shadows_[buffer];
  if (shadow.pages.empty()) {
    const Buffer& b = w.launch->buffers[buffer];
    shadow.first_page = b.address >> shift_ >> kPageShift;
    shadow.pages.resize(((b.address + b.bytes) >> shift_ >> kPageShift) - shadow.first_page + 1);
  }
  // good: the last access that was found to be ordered before this one. It often repeats from cell to cell.
  uint32_t good = self, base = base_;
  auto races = [&](uint32_t other) {
    if (other <= base || other == good) return false;
    if (!fine(w, access, other)) return true;
    good = other;
    return false;
  };
  // Whether the lanes access different places. If all access the same place, the value is a scalar, which every warp
  // uses: the exception for Triton's replicated loads does not hold then.
  auto vector = [&] {
    uint64_t first = address[__builtin_ctz(mask)], differ = 0;
    for_lanes(mask, [&](int l) { differ |= address[l] ^ first; });
    return differ != 0;
  };
  uint64_t number = kNone;
  Cell* cells = nullptr;
  uint32_t count = (bytes + (1u << shift_) - 1) >> shift_, last = base;
  uint32_t Cell::* moved = nullptr;  // the field of a cell that `last` moves to when another reader comes
  for (uint32_t rest = mask; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    uint64_t first = address[lane] >> shift_;
    if (!cells || first >> kPageShift != number) cells = page(shadow, number = first >> kPageShift);
    Cell* c = cells + (first & ((1u << kPageShift) - 1));
    for (uint32_t i = 0; i < count; ++i, ++c) {
      uint64_t place = (first + i) << shift_;
      if (races(c->writer)) {
        const Access& other = at(c->writer);
        if (access.use == Use::Write && other.use == Use::Write && !same_value_)
          suspect(w, lane, buffer, place, other);
        else if (!kReads || other.block != block_ || !replicated(w, *c, w.pc, false) || !vector())
          report(w, lane, buffer, place, w.pc, access.use, other);
      }
      uint32_t reader = c->reader;
      if (kReads) {
        if (reader == self) continue;
        if (reader > base && reader != last) {
          const Access& r = at(last = reader);
          moved = r.block != block_ ? &Cell::other_block : r.warp != w.index ? &Cell::other_warp : nullptr;
        }
        if (reader > base && moved) c->*moved = reader;
        c->reader = self;
        continue;
      }
      for (uint32_t r : {reader, c->other_warp, c->other_block})
        if (races(r) && !(at(r).block == block_ && replicated(w, *c, at(r).pc, true) && vector()))
          report(w, lane, buffer, place, w.pc, access.use, at(r));
      bool own = reader > base && at(reader).block == block_ && at(reader).warp == w.index;
      *c = {self, own ? reader : 0, 0, 0};
    }
  }
}

void GlobalRaces::check(Warp& w, const Instruction& ins, uint32_t buffer, uint32_t mask, const uint64_t* address,
                        uint32_t bytes, Use use) {
  if (!suspects_.empty()) settle();
  if (ins.order & kRelease) fence(w, !(ins.order & kBlockOnly));
  if ((ins.order & kStrong) && use != Use::Write && !publications_.empty())
    for_lanes(mask, [&](int l) { join(w, address[l]); });
  uint32_t self = note(w, ins, use);
  if (use == Use::Read)
    check_lanes<true>(w, self, buffer, mask, address, bytes);
  else
    check_lanes<false>(w, self, buffer, mask, address, bytes);
  if ((ins.order & kStrong) && use != Use::Read && any_fence_) for_lanes(mask, [&](int l) { publish(w, address[l]); });
}

void GlobalRaces::report(Warp& w, int lane, uint32_t buffer, uint64_t address, uint32_t pc, Use use,
                         const Access& other) {
  Launch& launch = *w.launch;
  if (launch.repeats("global_race", pc, other.pc)) return;
  const Buffer& b = launch.buffers[buffer];
  bool near = other.block == block_;
  std::string message =
      std::string("global memory ") + verb(use) + " of buffer '" + b.name + "' at byte " +
      std::to_string(address - b.address) + " by " + (near ? "warp " + std::to_string(w.index) : name(launch, block_)) +
      " and " + verb(other.use) + " by " +
      (near ? "warp " + std::to_string(other.warp) + " of its block" : name(launch, other.block)) + " at " +
      launch.place(other.pc) + " with " + (near ? "no barrier between them" : "nothing that orders them");
  Error* e = launch.report("global_race", message, w, pc, lane, other.pc);
  if (!e) return;
  e->buffer = b.name;
  e->has_address = e->has_offset = true;
  e->address = address;
  e->offset = address - b.address;
}

void GlobalRaces::suspect(Warp& w, int lane, uint32_t buffer, uint64_t address, const Access& other) {
  Suspect s{&w, lane, buffer, address, w.pc, other, {0, 0}};
  std::memcpy(s.content, reinterpret_cast<const void*>(address), size_t{1} << shift_);
  suspects_.push_back(s);
}

void GlobalRaces::settle() {
  for (const Suspect& s : suspects_)
    if (std::memcmp(s.content, reinterpret_cast<const void*>(s.address), size_t{1} << shift_) != 0)
      report(*s.warp, s.lane, s.buffer, s.address, s.pc, Use::Write, s.other);
  suspects_.clear();
}

// Accesses after the fence get a later stamp, so that the fence does not cover them.
void GlobalRaces::fence(Warp& w, bool wide) {
  any_fence_ = true;
  uint32_t& stamp = w.clock[w.index];
  fenced_here_[w.index] = stamp;
  if (wide)
    for (uint32_t v = 0; v < warps_; ++v) fenced_[v] = std::max(fenced_[v], w.clock[v]);
  ++stamp;
}

void GlobalRaces::join(Warp& w, uint64_t address) {
  auto it = publications_.find(address);
  if (it == publications_.end()) return;
  const Publication& p = it->second;
  if (p.block == block_) w.clock[p.warp] = std::max(w.clock[p.warp], p.stamp);
  if (p.block == block_ || p.blocks == last_joined_) return;
  last_joined_ = p.blocks;
  if (joined_.size() < p.blocks->size()) joined_.resize(p.blocks->size());
  for (size_t i = 0; i < p.blocks->size(); ++i) {
    uint64_t fresh = (*p.blocks)[i] & ~joined_[i];
    joined_[i] |= fresh;
    if (fresh) snapshot_ = nullptr;
  }
}

// Whoever joins this block later is ordered after the accesses that a fence has covered, as far as this warp itself is
// ordered after them.
void GlobalRaces::publish(Warp& w, uint64_t address) {
  Publication& p = publications_[address];
  p.block = block_;
  p.warp = w.index;
  p.stamp = fenced_here_[w.index];
  if (published_.size() <= block_) published_.resize(block_ + 1);
  std::vector<uint32_t>& mine = published_[block_];
  mine.resize(warps_);
  for (uint32_t v = 0; v < warps_; ++v)
    mine[v] = std::max(mine[v], v == w.index ? fenced_[v] : std::min(fenced_[v], w.clock[v]));
  if (!snapshot_) {
    auto all = std::make_shared<Blocks>(joined_);
    all->resize(std::max(all->size(), size_t(block_ / 64 + 1)));
    (*all)[block_ / 64] |= uint64_t{1} << block_ % 64;
    snapshot_ = std::move(all);
  }
  p.blocks = snapshot_;
}

}  // namespace gpt2fast::ptx
