// Functions of a Vec that are the same on every instruction set, and what all kernels need: task cutting, scratch.
#pragma once
#include <cstdint>

#include "../math.h"
#include "dispatch.h"

namespace gpt2fast {
namespace {

constexpr float kInfinity = __builtin_inff();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// e^x = 2^n e^r with n = round(x / ln 2): |r| <= ln 2 / 2, ln 2 in two parts, a degree-6 minimax polynomial for e^r.
// Error below 1.5 ulp; 0 below -104, infinity above 88.73; NaN stays NaN.
inline Vec exp(Vec x) {
  x = min(Vec::broadcast(100.f), max(Vec::broadcast(-110.f), x));
  Vec n = round(x * Vec::broadcast(1.44269504088896341f));
  Vec r = fma(n, Vec::broadcast(-0.693359375f), x);
  r = fma(n, Vec::broadcast(2.12194440e-4f), r);
  Vec p = Vec::broadcast(1.38145988e-3f);
  p = fma(p, r, Vec::broadcast(8.36871658e-3f));
  p = fma(p, r, Vec::broadcast(4.1668389e-2f));
  p = fma(p, r, Vec::broadcast(1.66665211e-1f));
  p = fma(p, r, Vec::broadcast(0.49999994f));
  p = fma(p, r * r, r) + Vec::broadcast(1.f);
  return scale2(p, n);
}

// Two Vecs side by side; a Vec header may have a faster one for a type.
template <class T>
inline void store_pair(Vec a, Vec b, T* p) {
  a.store(p);
  b.store(p + Vec::kLanes);
}

// out[i] = the sum over v[i]'s lanes, in one order whatever N and i; a Vec header may have a faster one.
template <int N>
inline void lane_sums(const Vec (&v)[N], float* out) {
  for (int i = 0; i < N; ++i) out[i] = reduce_add(v[i]);
}

// A buffer of one thread, grown as needed and kept; aligned to 64 bytes, contents undefined.
template <int kSlot>
inline void* scratch(size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() {
      if (data) cpu::workspace().give_back(data);
    }
  };
  static thread_local Buffer buffer;
  if (buffer.size < bytes) {
    if (buffer.data) cpu::workspace().give_back(buffer.data);
    buffer.data = nullptr;
    buffer.size = 0;
    buffer.data = cpu::workspace().take((bytes + 4095) & ~size_t(4095));
    buffer.size = bytes;
  }
  return buffer.data;
}

}  // namespace
}  // namespace gpt2fast
