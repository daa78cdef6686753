// N Vecs that go through the same formula together. While an operation of one Vec waits for its input, the CPU works on
// the others. In a loop over single Vecs, the CPU's scheduler is too small to overlap them.
#pragma once
#include "vec_math.h"

namespace gpt2fast {
namespace {

constexpr int kInStep = 2;

template <int N>
struct Vecs {
  static constexpr int kLanes = N * Vec::kLanes;
  Vec v[N];

  template <class F>
  GPT2FAST_INLINE static Vecs each(F f) {
    Vecs out;
    for (int i = 0; i < N; ++i) out.v[i] = f(i);
    return out;
  }
  GPT2FAST_INLINE static Vecs broadcast(float x) {
    return each([&](int) { return Vec::broadcast(x); });
  }
  template <class T>
  GPT2FAST_INLINE static Vecs load(const T* p) {
    return each([&](int i) { return Vec::load(p + i * Vec::kLanes); });
  }
  template <class T>
  GPT2FAST_INLINE void store(T* p) const {
    for (int i = 0; i + 1 < N; i += 2) store_pair(v[i], v[i + 1], p + i * Vec::kLanes);
    if constexpr (N % 2) v[N - 1].store(p + (N - 1) * Vec::kLanes);
  }
  template <class T>
  GPT2FAST_INLINE void stream(T* p) const {
    for (int i = 0; i < N; ++i) v[i].stream(p + i * Vec::kLanes);
  }
  GPT2FAST_INLINE Vec total() const {
    Vec sum = v[0];
    for (int i = 1; i < N; ++i) sum = sum + v[i];
    return sum;
  }
  GPT2FAST_INLINE friend Vecs operator+(Vecs a, Vecs b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  GPT2FAST_INLINE friend Vecs operator-(Vecs a, Vecs b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  GPT2FAST_INLINE friend Vecs operator*(Vecs a, Vecs b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  GPT2FAST_INLINE friend Vecs operator/(Vecs a, Vecs b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
  }
  GPT2FAST_INLINE friend Vecs fma(Vecs a, Vecs b, Vecs c) {
    return each([&](int i) { return fma(a.v[i], b.v[i], c.v[i]); });
  }
  GPT2FAST_INLINE friend Vecs max(Vecs a, Vecs b) {
    return each([&](int i) { return max(a.v[i], b.v[i]); });
  }
  GPT2FAST_INLINE friend Vecs min(Vecs a, Vecs b) {
    return each([&](int i) { return min(a.v[i], b.v[i]); });
  }
  GPT2FAST_INLINE friend Vecs abs(Vecs a) {
    return each([&](int i) { return abs(a.v[i]); });
  }
  GPT2FAST_INLINE friend Vecs round(Vecs a) {
    return each([&](int i) { return round(a.v[i]); });
  }
  GPT2FAST_INLINE friend Vecs scale2(Vecs a, Vecs n) {
    return each([&](int i) { return scale2(a.v[i], n.v[i]); });
  }
  GPT2FAST_INLINE friend Vecs select_less(Vecs a, Vecs b, Vecs yes, Vecs no) {
    return each([&](int i) { return select_less(a.v[i], b.v[i], yes.v[i], no.v[i]); });
  }
};

}  // namespace
}  // namespace gpt2fast
