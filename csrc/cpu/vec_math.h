// Functions of a Vec that are written once for all instruction sets, and small helpers that all kernels use.
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

// Fetches a line into the L2 cache, from where a load is cheap. Fetched into the L1, it would evict what is in use
// there.
inline void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

// A formula over Vecs must be inlined completely; otherwise its operands would go through memory.
#define GPT2FAST_INLINE inline __attribute__((always_inline))

constexpr float kLog2E = 1.44269504088896341f;

// A polynomial in r by Horner's rule. q is the highest coefficient; the others follow in descending order.
template <class V>
GPT2FAST_INLINE V horner(V q, V) {
  return q;
}
template <class V, class... Rest>
GPT2FAST_INLINE V horner(V q, V r, float next, Rest... rest) {
  return horner(fma(q, r, V::broadcast(next)), r, rest...);
}

// In all of these functions V is a Vec or a Vecs, and NaN stays NaN.

// 2^(n + r) for an integer n with |n| <= 252, and for |r| <= 1/2. The polynomial in r is a minimax fit. Its relative
// error is 3e-6 at degree 4, 9e-8 at degree 5 and 2e-8 at degree 6.
template <int kDegree, class V>
GPT2FAST_INLINE V exp2_of(V n, V r) {
  static_assert(4 <= kDegree && kDegree <= 6);
  V p;
  if constexpr (kDegree == 4)
    p = horner(V::broadcast(9.58285294e-3f), r, 5.59064262e-2f, 2.40240991e-1f, 6.93124175e-1f, 1.f);
  else if constexpr (kDegree == 5)
    p = horner(V::broadcast(1.32695702e-3f), r, 9.67129413e-3f, 5.55071086e-2f, 2.40222469e-1f, 6.93147004e-1f, 1.f);
  else
    p = horner(V::broadcast(1.53533620e-4f), r, 1.33988739e-3f, 9.61843692e-3f, 5.55033237e-2f, 2.40226477e-1f,
               6.93147182e-1f, 1.f);
  return scale2(p, n);
}

// 2^t for |t| <= 252.
template <int kDegree, class V>
GPT2FAST_INLINE V exp2_in_range(V t) {
  V n = round(t);
  return exp2_of<kDegree>(n, t - n);
}

// e^x for x <= 0: it is 1 at 0, and 0 below -104. Its relative error grows like |x| 2^-24, as does the error of x
// itself if x is a rounded difference. Callers pass a score minus the maximum, which is exact if the two are close,
// however large they are. If scores were multiplied by log2 e and rounded before the subtraction, the largest one could
// come out above 2^0.
template <int kDegree, class V>
GPT2FAST_INLINE V exp_nonpositive(V x) {
  return exp2_in_range<kDegree>(max(V::broadcast(-150.f), x * V::broadcast(kLog2E)));
}

// e^x for any x: it is 0 below -104 and infinity above 88.73. The error is below 1.5 ulp. For that, n ln 2 is
// subtracted in two parts; subtracting the first part is exact even where fma rounds twice.
inline Vec exp(Vec x) {
  x = min(Vec::broadcast(100.f), max(Vec::broadcast(-110.f), x));
  Vec n = round(x * Vec::broadcast(kLog2E));
  Vec r = fma(n, Vec::broadcast(2.12194440e-4f), fma(n, Vec::broadcast(-0.693359375f), x));
  return exp2_of<6>(n, r * Vec::broadcast(kLog2E));
}

// Stores two Vecs side by side. A Vec header may overload this with a faster version for one type.
template <class T>
inline void store_pair(Vec a, Vec b, T* p) {
  a.store(p);
  b.store(p + Vec::kLanes);
}

// out[i] = the sum over the lanes of v[i]. The order does not depend on N or i. A Vec header may have a faster version.
template <int N>
inline void lane_sums(const Vec (&v)[N], float* out) {
  for (int i = 0; i < N; ++i) out[i] = reduce_add(v[i]);
}

// A buffer that belongs to one thread; it grows as needed and is kept. It is aligned to 64 bytes, and its contents are
// undefined.
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
