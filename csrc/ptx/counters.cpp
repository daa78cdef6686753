// Sectors of 32 bytes that a request to global memory moves, and the passes that one to shared memory takes.
#include <algorithm>

#include "check.h"

namespace gpt2fast::ptx {
namespace {

constexpr uint64_t kSector = 32;

void add(Counts& c, uint64_t bytes, uint64_t sectors, uint64_t ideal) {
  ++c.requests;
  c.bytes += bytes;
  c.sectors += sectors;
  c.ideal_sectors += ideal;
}

// Passes over the banks for up to 32 words of 4 bytes: the most different words that one bank is asked for.
uint32_t passes(const uint32_t* words, int n) {
  bool run = true, same = true;
  for (int i = 1; i < n; ++i) {
    run = run && words[i] == words[0] + uint32_t(i);
    same = same && words[i] == words[0];
  }
  if ((run && n <= 32) || same) return 1;
  uint32_t head[32], next[64], count[32] = {}, most = 1;
  std::fill(head, head + 32, kNone);
  for (int i = 0; i < n; ++i) {
    uint32_t bank = words[i] & 31, at = head[bank];
    while (at != kNone && words[at] != words[i]) at = next[at];
    if (at != kNone) continue;
    next[i] = head[bank];
    head[bank] = uint32_t(i);
    most = std::max(most, ++count[bank]);
  }
  return most;
}

}  // namespace

void count_global(Counts& c, uint32_t mask, const uint64_t* address, uint32_t bytes, uint64_t* moved) {
  uint64_t total = uint64_t(__builtin_popcount(mask)) * bytes;
  int first = __builtin_ctz(mask);
  uint64_t base = address[first];
  if (mask == kAllLanes) {
    uint64_t run = 0, same = 0;
    for (int l = 0; l < kLanes; ++l) {
      run |= address[l] ^ (base + uint64_t(l) * bytes);
      same |= address[l] ^ base;
    }
    if (run == 0 || same == 0) {
      uint64_t size = run == 0 ? total : bytes;
      *moved = (base + size - 1) / kSector - base / kSector + 1;
      return add(c, total, *moved, (size + kSector - 1) / kSector);
    }
  }
  uint64_t sorted[kLanes];
  int n = 0;
  for_lanes(mask, [&](int l) { sorted[n++] = address[l]; });
  if (!std::is_sorted(sorted, sorted + n)) std::sort(sorted, sorted + n);
  uint64_t sectors = 0, distinct = 0, end = 0, last_sector = ~uint64_t{0};
  for (int i = 0; i < n; ++i) {
    uint64_t begin = std::max(sorted[i], end), stop = sorted[i] + bytes;
    if (stop > begin) distinct += stop - begin;
    end = std::max(end, stop);
    uint64_t from = sorted[i] / kSector, to = (stop - 1) / kSector;
    if (last_sector != ~uint64_t{0} && from <= last_sector) from = last_sector + 1;
    if (to + 1 > from) {
      sectors += to + 1 - from;
      last_sector = to;
    }
  }
  *moved = sectors;
  add(c, total, sectors, (distinct + kSector - 1) / kSector);
}

// Words of 8 bytes go by half warps, of 16 bytes by quarter warps.
void count_shared(Counts& c, uint32_t mask, const uint64_t* address, uint32_t bytes) {
  ++c.requests;
  c.bytes += uint64_t(__builtin_popcount(mask)) * bytes;
  int lanes = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8, each_words = bytes <= 4 ? 1 : int(bytes / 4);
  for (int part = 0; part < kLanes; part += lanes) {
    uint32_t words[32];
    int n = 0;
    for (int l = part; l < part + lanes; ++l) {
      if (!(mask >> l & 1)) continue;
      for (int k = 0; k < each_words; ++k) words[n++] = uint32_t(address[l] / 4) + uint32_t(k);
    }
    if (!n) continue;
    uint32_t taken = passes(words, n);
    c.wavefronts += taken;
    c.bank_conflicts += taken - 1;
  }
}

}  // namespace gpt2fast::ptx
