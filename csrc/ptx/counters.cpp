// Counts the 32-byte sectors that a request to global memory moves, and the passes that a request to shared memory
// takes.
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

// The passes over the banks for n pieces of `words` 4-byte words each: the largest number of different pieces that one
// bank must deliver. Pieces are aligned to their size, so that two pieces with one common bank have all banks in
// common.
uint32_t passes(const uint32_t* pieces, int n, uint32_t words) {
  uint32_t places = 32 / words, seen = 0, first[32];
  bool conflict = false;
  for (int i = 0; i < n; ++i) {
    uint32_t place = pieces[i] & (places - 1);
    if (seen >> place & 1) {
      conflict = conflict || first[place] != pieces[i];
    } else {
      seen |= 1u << place;
      first[place] = pieces[i];
    }
  }
  if (!conflict) return 1;
  uint32_t sorted[kLanes], count[32] = {}, most = 0;
  std::copy(pieces, pieces + n, sorted);
  std::sort(sorted, sorted + n);
  for (int i = 0; i < n; ++i)
    if (i == 0 || sorted[i] != sorted[i - 1]) most = std::max(most, ++count[sorted[i] & (places - 1)]);
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

// Accesses of 8 bytes are served by half warps, those of 16 bytes by quarter warps.
void count_shared(Counts& c, uint32_t mask, const uint64_t* address, uint32_t bytes) {
  ++c.requests;
  c.bytes += uint64_t(__builtin_popcount(mask)) * bytes;
  uint32_t words = bytes <= 4 ? 1 : bytes / 4, shift = bytes <= 4 ? 2 : bytes == 8 ? 3 : 4;
  int lanes = kLanes / int(words);
  for (int part = 0; part < kLanes; part += lanes) {
    uint32_t pieces[kLanes];
    int n = 0;
    for (int l = part; l < part + lanes; ++l) {
      pieces[n] = uint32_t(address[l] >> shift);
      n += int(mask >> l & 1);
    }
    if (!n) continue;
    uint32_t taken = passes(pieces, n, words);
    c.wavefronts += taken;
    c.bank_conflicts += taken - 1;
  }
}

}  // namespace gpt2fast::ptx
