// Vec in plain C++ with four lanes, for any CPU. See vec_avx512.h for what each operation means.
#pragma once
#include <cmath>

#include "../dtype.h"

namespace gpt2fast {
namespace {

struct Vec {
  static constexpr int kLanes = 4;
  static constexpr int kRegisters = 16;
  float v[kLanes];

  template <class F>
  static Vec each(F f) {
    Vec out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = f(i);
    return out;
  }
  static Vec zero() { return broadcast(0); }
  static Vec broadcast(float x) {
    return each([&](int) { return x; });
  }
  template <class T>
  static Vec load(const T* p) {
    return each([&](int i) { return to_float(p[i]); });
  }
  template <class T>
  static Vec load(const T* p, int n) {
    return each([&](int i) { return i < n ? to_float(p[i]) : 0.f; });
  }
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < kLanes; ++i) p[i] = from_float<T>(v[i]);
  }
  template <class T>
  void store(T* p, int n) const {
    for (int i = 0; i < n; ++i) p[i] = from_float<T>(v[i]);
  }
  template <class T>
  void stream(T* p) const {
    store(p);
  }

  friend Vec operator+(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  friend Vec operator-(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  friend Vec operator*(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  friend Vec operator/(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
  }
  friend Vec fma(Vec a, Vec b, Vec c) {  // rounds twice: a baseline CPU has no fused instruction
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  friend Vec max(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  friend Vec min(Vec a, Vec b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  friend Vec abs(Vec a) {
    return each([&](int i) { return std::fabs(a.v[i]); });
  }
  friend Vec round(Vec a) {
    return each([&](int i) { return std::nearbyint(a.v[i]); });
  }
  friend Vec scale2(Vec a, Vec n) {
    return each([&](int i) { return a.v[i] == a.v[i] ? std::ldexp(a.v[i], int(n.v[i])) : a.v[i]; });
  }
  friend Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return each([&](int i) { return a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; });
  }
  void store_bytes(int8_t* p) const {
    for (int i = 0; i < kLanes; ++i) p[i] = int8_t(std::nearbyint(v[i]));
  }
  friend float reduce_add(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
  friend float reduce_max(Vec a) {
    float x = a.v[0];
    for (int i = 1; i < kLanes; ++i) x = a.v[i] > x ? a.v[i] : x;
    return x;
  }
  static void transpose(Vec (&r)[kLanes]) {
    for (int i = 0; i < kLanes; ++i)
      for (int j = 0; j < i; ++j) {
        float t = r[i].v[j];
        r[i].v[j] = r[j].v[i];
        r[j].v[i] = t;
      }
  }
};

struct Pairs {
  bfloat16 v[2 * Vec::kLanes];
  static Pairs load(const bfloat16* p) { return load(p, 2 * Vec::kLanes); }
  static Pairs load(const bfloat16* p, int n) {
    Pairs out = {};
    __builtin_memcpy(out.v, p, size_t(n) * 2);
    return out;
  }
  static Pairs broadcast(const bfloat16* p) {
    Pairs out;
    for (int i = 0; i < 2 * Vec::kLanes; ++i) out.v[i] = p[i & 1];
    return out;
  }
  static Pairs zip(const bfloat16* a, const bfloat16* b) {
    Pairs out;
    for (int i = 0; i < Vec::kLanes; ++i) out.v[2 * i] = a[i], out.v[2 * i + 1] = b[i];
    return out;
  }
  void store(bfloat16* p) const { __builtin_memcpy(p, v, sizeof(v)); }
  Vec low() const {
    return Vec::each([&](int i) { return to_float(v[2 * i]); });
  }
  Vec high() const {
    return Vec::each([&](int i) { return to_float(v[2 * i + 1]); });
  }
  Vec as_vec() const {
    Vec out;
    __builtin_memcpy(out.v, v, sizeof(v));
    return out;
  }
  static Pairs from_vec(Vec a) {
    Pairs out;
    __builtin_memcpy(out.v, a.v, sizeof(a.v));
    return out;
  }
  friend Vec dot(Pairs a, Pairs b, Vec acc) { return fma(a.high(), b.high(), fma(a.low(), b.low(), acc)); }
};

struct Ints {
  int32_t v[Vec::kLanes];
  static Ints broadcast(int32_t x) { return {{x, x, x, x}}; }
  friend Ints operator+(Ints a, Ints b) {
    for (int i = 0; i < Vec::kLanes; ++i) a.v[i] += b.v[i];
    return a;
  }
  Vec as_float() const {
    return Vec::each([&](int i) { return float(v[i]); });
  }
};

struct SignedBytes {
  int8_t v[4];
  static SignedBytes broadcast(int32_t bytes) {
    SignedBytes out;
    __builtin_memcpy(out.v, &bytes, 4);
    return out;
  }
};

struct UnsignedBytes {
  uint8_t v[4 * Vec::kLanes];
  static UnsignedBytes load(const uint8_t* p) {
    UnsignedBytes out;
    __builtin_memcpy(out.v, p, sizeof(out.v));
    return out;
  }
  UnsignedBytes low_halves() const {
    UnsignedBytes out;
    for (int i = 0; i < 4 * Vec::kLanes; ++i) out.v[i] = v[i] & 15;
    return out;
  }
  UnsignedBytes high_halves() const {
    UnsignedBytes out;
    for (int i = 0; i < 4 * Vec::kLanes; ++i) out.v[i] = v[i] >> 4;
    return out;
  }
  friend Ints dot(UnsignedBytes a, SignedBytes b, Ints sum) {
    for (int i = 0; i < 4 * Vec::kLanes; ++i) sum.v[i / 4] += a.v[i] * b.v[i % 4];
    return sum;
  }
};

inline void prefetch(const void*) {}
inline void stream_fence() {}

}  // namespace
}  // namespace gpt2fast
