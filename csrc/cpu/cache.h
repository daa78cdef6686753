// When to write past the caches: the stores then cost no read of the line they replace and evict nothing.
#pragma once
#include "vec_math.h"

namespace gpt2fast {
namespace {

// Bytes that a call reads and writes above which what it wrote first is gone from a usual last-level cache.
constexpr int64_t kCacheBytes = int64_t(16) << 20;

inline bool exceeds_cache(int64_t bytes) { return bytes > kCacheBytes; }

// Elements of p before the first that Vec::stream may be given.
template <class T>
inline int64_t elements_to_alignment(const T* p) {
  constexpr uintptr_t kBytes = Vec::kLanes * sizeof(T);
  return int64_t((kBytes - uintptr_t(p) % kBytes) % kBytes / sizeof(T));
}

}  // namespace
}  // namespace gpt2fast
