// cp.async. The source is read at once. The bytes wait in the warp's queue and arrive in shared memory when the warp
// waits for the copy. Until then the cells that the copy writes are marked, and any access to them is a race.
#include <cstring>

#include "check.h"
#include "decode.h"

namespace gpt2fast::ptx {
namespace {

enum Modes : uint8_t { kBytes, kSource, kDestinationWide };
enum Source : uint8_t { kWhole, kCounted, kIgnored, kKept };  // kIgnored: a predicate; kKept: its negation

void read_source(Warp& w, const Instruction& i, uint32_t mask, const uint64_t* address, const uint32_t* bytes,
                 Copy& copy) {
  uint8_t* at[kLanes];
  for (uint32_t rest = mask; rest;) {  // lanes that read the same number of bytes go together
    uint32_t size = bytes[__builtin_ctz(rest)], same = 0;
    for_lanes(rest, [&](int l) { same |= uint32_t(bytes[l] == size) << l; });
    rest &= ~same;
    if (size == 0) continue;
    uint32_t good = access_global(w, i, same, address, size, Use::Read, at);
    for_lanes(good, [&](int l) { std::memcpy(copy.data[l], at[l], size); });
  }
}

// Checks the copy's destination, as a write that is in flight from now on. Returns the lanes that may write.
uint32_t start_write(Warp& w, const Instruction& i, uint32_t mask, const uint64_t* address, uint32_t bytes,
                     Copy& copy) {
  uint8_t* at[kLanes];
  uint32_t good = access_shared(w, i, mask, address, bytes, Use::Write, at, true);
  for_lanes(good, [&](int l) { copy.target[l] = uint32_t(address[l]); });
  return good;
}

// operand: destination, what is added to it, source, [bytes of the source or predicate]
void start_copy(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t from[kLanes], to[kLanes];
  uint32_t size[kLanes], bytes = i.mode[kBytes];
  addresses(w, i, 2, from);
  Instruction destination = i;
  destination.wide_address = i.mode[kDestinationWide];
  destination.immediate = int32_t(i.operand[1]);
  addresses(w, destination, 0, to);
  uint32_t oversized = 0;
  for (int l = 0; l < kLanes; ++l) {
    size[l] = bytes;
    if (i.mode[kSource] == kCounted) size[l] = w.lanes<uint32_t>(i.operand[3])[l];
    if (i.mode[kSource] >= kIgnored && (w.predicate(i.operand[3]) >> l & 1) == (i.mode[kSource] == kIgnored))
      size[l] = 0;
    oversized |= uint32_t(size[l] > bytes) << l;
  }
  oversized &= mask;
  if (oversized) {
    int l = __builtin_ctz(oversized);
    w.launch->report("bounds",
                     "cp.async of " + std::to_string(bytes) + " bytes is told to read " + std::to_string(size[l]), w,
                     w.pc, l);
    for_lanes(oversized, [&](int lane) { size[lane] = bytes; });
  }
  // Each lane counts its groups. The counts differ if the lanes have diverged in between.
  while (mask) {
    uint32_t group = w.copy_groups[__builtin_ctz(mask)], same = 0;
    for_lanes(mask, [&](int l) { same |= uint32_t(w.copy_groups[l] == group) << l; });
    mask &= ~same;
    Copy& copy = w.copies.emplace_back();
    copy.pc = w.pc;
    copy.group = group;
    copy.bytes = bytes;
    std::memset(copy.data, 0, sizeof copy.data);
    read_source(w, i, same, from, size, copy);
    copy.mask = start_write(w, i, same, to, bytes, copy);
    if (!copy.mask) w.copies.pop_back();
  }
}

// The bytes of a copy arrive in shared memory. They count as written by this warp now.
void land(Warp& w, const Copy& copy, uint32_t mask) {
  Block& block = *w.block;
  block.races.settle();
  for_lanes(mask, [&](int l) {
    uint32_t offset = copy.target[l];
    std::memcpy(block.shared.data() + offset, copy.data[l], copy.bytes);
    std::memset(block.shared_written.data() + offset, 1, copy.bytes);
    if (w.launch->config.racecheck) block.races.land(w, copy.pc, offset, copy.bytes);
  });
}

void commit(Warp& w, const Instruction&, uint32_t mask) {
  for_lanes(mask, [&](int l) { ++w.copy_groups[l]; });
}

// immediate: how many of the latest groups may stay in flight; -1: none, and no uncommitted copy either.
void wait(Warp& w, const Instruction& i, uint32_t mask) {
  for (Copy& copy : w.copies) {
    uint32_t landed = 0;
    for_lanes(mask & copy.mask, [&](int l) {
      landed |= uint32_t(i.immediate < 0 || int64_t(copy.group) + i.immediate < int64_t(w.copy_groups[l])) << l;
    });
    land(w, copy, landed);
    copy.mask &= ~landed;
  }
  while (!w.copies.empty() && !w.copies.front().mask) w.copies.pop_front();
}

void decode_source_size(Decoder& d) {
  Operand& o = d.operand();
  const Symbol* s = d.symbol(o);
  bool predicate = s && s->what == Symbol::Register && s->type == Type::Pred;
  d.ins.mode[kSource] = predicate ? o.negated ? kKept : kIgnored : kCounted;
  d.read_operand(o, predicate ? Type::Pred : Type::B32, true);
}

void decode_copy(Decoder& d) {
  bool all_levels = d.take("ca");
  if (!all_levels && !d.take("cg")) d.fail("expected .ca or .cg");
  if (!d.take("shared") && !d.take("shared::cta")) d.fail("expected .shared");
  if (!d.take("global")) d.fail("expected .global");
  bool hint = d.take("L2::cache_hint");
  d.take("L2::64B") || d.take("L2::128B") || d.take("L2::256B");
  d.ins.copies = true;
  d.address(Space::Shared);
  d.ins.mode[kDestinationWide] = d.ins.wide_address;
  if (d.ins.immediate != int32_t(d.ins.immediate)) d.fail("the offset of the destination is too large");
  d.add(uint32_t(d.ins.immediate));
  d.address(Space::Global);
  const Operand& size = d.operand();
  bool allowed = size.integer == 16 || (all_levels && (size.integer == 4 || size.integer == 8));
  if (size.what != Operand::Integer || !allowed)
    d.fail(std::string("expected ") + (all_levels ? "4, 8 or 16" : "16") + " as the number of bytes");
  d.ins.bytes = uint8_t(size.integer);
  d.ins.mode[kBytes] = uint8_t(size.integer);
  if (d.left() > size_t(hint)) decode_source_size(d);
  if (hint) {
    d.read(Type::B64);
    d.state.pool.pop_back();
  }
  d.ins.run = start_copy;
}

void decode(Decoder& d) {
  d.ins.kind = Class::Memory;
  if (!d.take("async")) d.fail("expected cp.async");
  if (d.take("commit_group")) {
    d.ins.run = commit;
  } else if (d.take("wait_all")) {
    d.ins.immediate = -1;
    d.ins.run = wait;
  } else if (d.take("wait_group")) {
    const Operand& groups = d.operand();
    if (groups.what != Operand::Integer || groups.integer < 0) d.fail("expected a number of groups");
    d.ins.immediate = groups.integer;
    d.ins.run = wait;
  } else {
    decode_copy(d);
  }
}

}  // namespace

void add_async_copy(Opcodes& table) { table["cp"] = decode; }

}  // namespace gpt2fast::ptx
