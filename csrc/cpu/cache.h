// When to write past the caches (non-temporal stores). Such a store does not read the line that it replaces, and it
// evicts nothing from the caches.
#pragma once
#include "vec_math.h"

namespace gpt2fast {
namespace {

// When a call reads and writes more bytes than this, a usual last-level cache no longer holds what it wrote first.
constexpr int64_t kCacheBytes = int64_t(16) << 20;

inline bool exceeds_cache(int64_t bytes) { return bytes > kCacheBytes; }

// How many elements come before the first one in p that is aligned enough for Vec::stream.
template <class T>
inline int64_t elements_to_alignment(const T* p) {
  constexpr uintptr_t kBytes = Vec::kLanes * sizeof(T);
  return int64_t((kBytes - uintptr_t(p) % kBytes) % kBytes / sizeof(T));
}

}  // namespace
}  // namespace gpt2fast
