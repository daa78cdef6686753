// Checks memory accesses: bounds, alignment, provenance of the pointer, and reads of uninitialised memory.
#include "check.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace gpt2fast::ptx {
namespace {

constexpr size_t kMostUnwritten = 1 << 16;  // at most so many suspicious reads are kept until the end of a block

const char* verb(Use use) { return use == Use::Read ? "read" : use == Use::Write ? "write" : "atomic operation"; }

std::string hex(uint64_t v) {
  char s[24];
  std::snprintf(s, sizeof s, "0x%llx", static_cast<unsigned long long>(v));
  return s;
}

std::string what(const char* space, uint32_t bytes, Use use) {
  return std::string(space) + " " + verb(use) + " of " + std::to_string(bytes) + " bytes";
}

// Reports what is wrong with a lane's access. buffer is nullptr if the address is outside of all buffers.
void report(Warp& w, const char* kind, const std::string& message, int lane, uint64_t address,
            const Buffer* buffer = nullptr) {
  Error* e = w.launch->report(kind, message, w, w.pc, lane);
  if (!e) return;
  e->has_address = true;
  e->address = address;
  if (!buffer) return;
  e->buffer = buffer->name;
  e->has_offset = true;
  e->offset = address - buffer->address;
}

uint32_t misaligned(Warp& w, const Instruction& ins, uint32_t mask, const uint64_t* address, uint32_t bytes,
                    const char* space, Use use) {
  uint64_t low = 0, align = uint64_t(ins.bytes) * ins.elements;
  if (mask == kAllLanes) {
    for (int l = 0; l < kLanes; ++l) low |= address[l];
  } else {
    for_lanes(mask, [&](int l) { low |= address[l]; });
  }
  if ((low & (align - 1)) == 0) return 0;
  uint32_t bad = 0;
  for_lanes(mask, [&](int l) { bad |= uint32_t((address[l] & (align - 1)) != 0) << l; });
  int lane = __builtin_ctz(bad);
  uint32_t b = ins.space == Space::Shared ? kNone : w.launch->find_buffer(address[lane]);
  report(w, "misaligned",
         what(space, bytes, use) + " at " + hex(address[lane]) + ", which is no multiple of " + std::to_string(align),
         lane, address[lane], b == kNone ? nullptr : &w.launch->buffers[b]);
  return bad;
}

// Whether all bytes of a shadow are set.
bool all_written(const uint8_t* shadow, uint32_t bytes) {
  constexpr uint64_t kSet = 0x0101010101010101u;
  for (; bytes >= 8; bytes -= 8, shadow += 8) {
    uint64_t eight;
    std::memcpy(&eight, shadow, 8);
    if (eight != kSet) return false;
  }
  for (; bytes; --bytes)
    if (!*shadow++) return false;
  return true;
}

// No buffer contains this address. Says which one is nearest.
std::string nearest(const Launch& launch, uint64_t address, uint32_t bytes, uint16_t pointer) {
  auto describe = [&](const Buffer& b) {
    std::string size = " buffer '" + b.name + "' (" + std::to_string(b.bytes) + " bytes)";
    if (address < b.address) return std::to_string(b.address - address) + " bytes before" + size;
    uint64_t past = address + bytes - b.address - b.bytes;
    return (address >= b.address + b.bytes ? std::to_string(address - b.address - b.bytes) + " bytes past the end of"
                                           : "the last " + std::to_string(past) + " past the end of") +
           size;
  };
  if (pointer) return describe(launch.buffers[pointer - 1u]);
  const Buffer* best = nullptr;
  uint64_t distance = 0;
  for (const Buffer& b : launch.buffers) {
    uint64_t d = address < b.address             ? b.address - address
                 : address - b.address < b.bytes ? 0
                                                 : address - b.address - b.bytes;
    if (!best || d < distance) best = &b, distance = d;
  }
  if (!best || distance > (uint64_t{1} << 32)) return "far from every buffer";
  return describe(*best);
}

uint32_t find(Launch& launch, uint64_t address, uint32_t bytes) {
  uint32_t b = launch.find_buffer(address);
  return b != kNone && launch.buffers[b].address + launch.buffers[b].bytes - address >= bytes ? b : kNone;
}

void use_contents(Warp& w, Buffer& b, uint32_t mask, const uint64_t* address, uint32_t bytes, Use use) {
  if (use != Use::Write && w.launch->config.memcheck) {
    for (uint32_t rest = mask; rest; rest &= rest - 1) {
      int lane = __builtin_ctz(rest);
      const uint8_t* shadow = b.written + (address[lane] - b.address);
      if (all_written(shadow, bytes)) continue;
      report(w, "uninitialised",
             what("global", bytes, use) + " of buffer '" + b.name + "' at byte " +
                 std::to_string(address[lane] - b.address) + ", which nothing has written",
             lane, address[lane], &b);
      break;
    }
  }
  if (use != Use::Read)
    for_lanes(mask, [&](int l) { std::fill_n(b.written + (address[l] - b.address), bytes, uint8_t{1}); });
}

uint32_t in_one_buffer(Warp& w, const Instruction& ins, uint32_t buffer, uint32_t mask, const uint64_t* address,
                       uint32_t bytes, Use use) {
  Launch& launch = *w.launch;
  Buffer& b = launch.buffers[buffer];
  int lane = __builtin_ctz(mask);
  uint16_t pointer = w.pointers[ins.target];
  if (launch.config.memcheck && pointer && pointer != buffer + 1)
    report(w, "provenance",
           what("global", bytes, use) + " of buffer '" + b.name + "' at byte " +
               std::to_string(address[lane] - b.address) + " through a pointer into buffer '" +
               launch.buffers[pointer - 1u].name + "'",
           lane, address[lane], &b);
  if (b.read_only && use != Use::Read) {
    report(w, "read_only", what("global", bytes, use) + " of constant '" + b.name + "'", lane, address[lane], &b);
    return 0;
  }
  if (b.written) use_contents(w, b, mask, address, bytes, use);
  if (use == Use::Write) launch.wrote = true;
  if (use != Use::Write) launch.polled = w.pc;
  if (launch.global_races.on() && !b.read_only) launch.global_races.check(w, ins, buffer, mask, address, bytes, use);
  uint64_t sectors = 0;
  Counts constant;  // discarded: constant memory does not count as global
  count_global(ins.space == Space::Const ? constant : launch.global_counts[w.pc], mask, address, bytes, &sectors);
  uint64_t total = uint64_t(__builtin_popcount(mask)) * bytes;
  if (use != Use::Write) b.traffic.read_bytes += total, b.traffic.read_sectors += sectors;
  if (use != Use::Read) b.traffic.written_bytes += total, b.traffic.written_sectors += sectors;
  return mask;
}

uint32_t access_local(Warp& w, const Instruction& ins, uint32_t mask, const uint64_t* address, uint32_t bytes, Use use,
                      uint8_t** at) {
  mask &= ~misaligned(w, ins, mask, address, bytes, "local", use);
  uint32_t size = w.launch->module.local_bytes, good = 0;
  for_lanes(mask, [&](int l) {
    if (address[l] > size || size - address[l] < bytes) {
      report(w, "bounds",
             what("local", bytes, use) + " at " + hex(address[l]) + " of " + std::to_string(size) + " bytes", l,
             address[l]);
      return;
    }
    good |= 1u << l;
    size_t place = (size_t(w.index) * kLanes + size_t(l)) * size + address[l];
    at[l] = w.block->local.data() + place;
    uint8_t* shadow = w.block->local_written.data() + place;
    if (use == Use::Read && w.launch->config.memcheck && !all_written(shadow, bytes))
      report(w, "uninitialised", what("local", bytes, use) + " at " + hex(address[l]) + ", which nothing has written",
             l, address[l]);
    if (use != Use::Read) std::fill_n(shadow, bytes, uint8_t{1});
  });
  return good;
}

uint32_t access_param(Warp& w, uint32_t mask, const uint64_t* address, uint32_t bytes, Use use, uint8_t** at) {
  const std::vector<uint8_t>& params = w.launch->config.params;
  auto base = reinterpret_cast<uint64_t>(params.data());
  uint32_t good = 0;
  for_lanes(mask, [&](int l) {
    uint64_t offset = address[l] - base;
    if (use != Use::Read || offset > params.size() || params.size() - offset < bytes) {
      report(w, "bounds",
             what("parameter", bytes, use) + " at byte " + std::to_string(int64_t(offset)) + " of " +
                 std::to_string(params.size()),
             l, address[l]);
      return;
    }
    good |= 1u << l;
    at[l] = reinterpret_cast<uint8_t*>(address[l]);
  });
  return good;
}

}  // namespace

bool Block::in_shared(uint64_t offset, uint64_t bytes) const {
  uint64_t end = launch->kernel.shared_bytes, start = launch->module.dynamic_shared_start;
  if (offset + bytes <= end) return true;
  return offset >= start && offset + bytes <= launch->shared_bytes;
}

uint32_t access_global(Warp& w, const Instruction& ins, uint32_t mask, const uint64_t* address, uint32_t bytes, Use use,
                       uint8_t** at) {
  Launch& launch = *w.launch;
  mask &= ~misaligned(w, ins, mask, address, bytes, "global", use);
  if (!mask) return 0;
  uint64_t low = ~uint64_t{0}, high = 0;
  if (mask == kAllLanes) {
    for (int l = 0; l < kLanes; ++l) low = std::min(low, address[l]), high = std::max(high, address[l]);
  } else {
    for_lanes(mask, [&](int l) { low = std::min(low, address[l]), high = std::max(high, address[l]); });
  }
  for (int l = 0; l < kLanes; ++l) at[l] = reinterpret_cast<uint8_t*>(address[l]);
  uint32_t& hint = launch.hint[w.pc];
  auto holds = [&](const Buffer& b) {
    return low >= b.address && high - b.address < b.bytes && b.address + b.bytes - high >= bytes;
  };
  if (hint < launch.buffers.size() && holds(launch.buffers[hint]))
    return in_one_buffer(w, ins, hint, mask, address, bytes, use);
  uint32_t b = find(launch, low, bytes);
  if (b != kNone && holds(launch.buffers[b])) return hint = b, in_one_buffer(w, ins, b, mask, address, bytes, use);
  uint32_t good = 0, rest = mask;
  bool first = true;
  while (rest) {  // the lanes access several buffers, or lie outside of them
    int lane = __builtin_ctz(rest);
    b = find(launch, address[lane], bytes);
    if (b == kNone) {
      uint16_t pointer = w.pointers[ins.target];
      if (first)
        report(w, "bounds",
               what("global", bytes, use) + " at " + hex(address[lane]) + ", " +
                   nearest(launch, address[lane], bytes, pointer),
               lane, address[lane], pointer ? &launch.buffers[pointer - 1u] : nullptr);
      else
        launch.repeats("bounds", w.pc);
      first = false;
      rest &= rest - 1;
      continue;
    }
    uint32_t same = 0;
    for_lanes(rest, [&](int l) { same |= uint32_t(find(launch, address[l], bytes) == b) << l; });
    good |= in_one_buffer(w, ins, b, same, address, bytes, use);
    rest &= ~same;
  }
  return good;
}

namespace {

// The lanes whose accesses lie in the static or the dynamic part.
uint32_t within_shared(Warp& w, uint32_t mask, const uint64_t* address, uint32_t bytes, Use use) {
  Launch& launch = *w.launch;
  uint64_t low = ~uint64_t{0}, high = 0;
  for (int l = 0; l < kLanes; ++l) {
    if (!(mask >> l & 1)) continue;
    low = std::min(low, address[l]);
    high = std::max(high, address[l]);
  }
  if (high <= launch.shared_bytes && w.block->in_shared(low, high - low + bytes)) return mask;
  uint32_t good = mask;
  for_lanes(mask, [&](int l) {
    if (address[l] <= launch.shared_bytes && w.block->in_shared(address[l], bytes)) return;
    good &= ~(1u << l);
    report(
        w, "bounds",
        what("shared", bytes, use) + " at " + hex(address[l]) + " of " + std::to_string(launch.shared_bytes) + " bytes",
        l, address[l]);
  });
  return good;
}

}  // namespace

uint32_t access_shared(Warp& w, const Instruction& ins, uint32_t mask, const uint64_t* address, uint32_t bytes, Use use,
                       uint8_t** at, bool copy) {
  Launch& launch = *w.launch;
  Block& block = *w.block;
  mask &= ~misaligned(w, ins, mask, address, bytes, "shared", use);
  uint32_t good = within_shared(w, mask, address, bytes, use);
  for (int l = 0; l < kLanes; ++l) at[l] = block.shared.data() + address[l];
  if (!good) return 0;
  if (launch.config.racecheck) block.races.check(w, good, address, bytes, use, copy);
  if (use == Use::Write) launch.wrote = true;
  uint8_t* written = block.shared_written.data();
  if (use != Use::Write && launch.config.memcheck) {
    for_lanes(good, [&](int l) {
      if (all_written(written + address[l], bytes)) return;
      if (block.unwritten.size() < kMostUnwritten) block.unwritten.push_back({w.index, l, w.pc, address[l], bytes});
    });
  }
  if (use != Use::Read && !copy) for_lanes(good, [&](int l) { std::memset(written + address[l], 1, bytes); });
  count_shared(launch.shared_counts[w.pc], good, address, bytes);
  return good;
}

// A read that races with a write is not reported here: the race is reported, and the order of the two is chance.
void report_unwritten(Block& block) {
  Launch& launch = *block.launch;
  for (const UnwrittenRead& r : block.unwritten) {
    if (launch.config.racecheck && block.races.found(r.offset, r.bytes)) continue;
    Use use = launch.module.code[r.pc].use;
    Error* e = launch.report("uninitialised",
                             what("shared", r.bytes, use) + " at " + hex(r.offset) + ", which nothing has written",
                             block.warps[r.warp], r.pc, r.lane);
    if (e) e->has_address = true, e->address = r.offset;
  }
  block.unwritten.clear();
}

void addresses(const Warp& w, const Instruction& ins, uint32_t o, uint64_t* address) {
  if (ins.wide_address) {
    const auto* a = w.lanes<uint64_t>(ins.operand[o]);
    for (int l = 0; l < kLanes; ++l) address[l] = a[l] + uint64_t(ins.immediate);
  } else {
    const auto* a = w.lanes<uint32_t>(ins.operand[o]);
    for (int l = 0; l < kLanes; ++l) address[l] = a[l] + uint32_t(ins.immediate);
    for (int l = 0; l < kLanes; ++l) address[l] &= 0xffffffffu;
  }
}

uint32_t access(Warp& w, const Instruction& ins, uint32_t mask, uint64_t* address, uint32_t bytes, Use use,
                uint8_t** at) {
  switch (ins.space) {
    case Space::Shared:
      return access_shared(w, ins, mask, address, bytes, use, at);
    case Space::Global:
    case Space::Const:
      return access_global(w, ins, mask, address, bytes, use, at);
    case Space::Local:
      return access_local(w, ins, mask, address, bytes, use, at);
    case Space::Param:
      return access_param(w, mask, address, bytes, use, at);
    case Space::Generic:
      break;
  }
  uint32_t shared = 0, local = 0, good = 0;
  for_lanes(mask, [&](int l) {
    if (address[l] - kSharedWindow < kWindowBytes)
      shared |= 1u << l, address[l] -= kSharedWindow;
    else if (address[l] - kLocalWindow < kWindowBytes)
      local |= 1u << l, address[l] -= kLocalWindow;
  });
  if (shared) good |= access_shared(w, ins, shared, address, bytes, use, at);
  if (local) good |= access_local(w, ins, local, address, bytes, use, at);
  uint32_t global = mask & ~shared & ~local;
  if (global) {
    uint8_t* place[kLanes];
    uint32_t ok = access_global(w, ins, global, address, bytes, use, place);
    for_lanes(ok, [&](int l) { at[l] = place[l]; });
    good |= ok;
  }
  return good;
}

}  // namespace gpt2fast::ptx
