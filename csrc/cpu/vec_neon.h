// Vec for AArch64 NEON. See vec_avx512.h for what each operation means.
#pragma once
#include <arm_neon.h>

#include "../dtype.h"

namespace gpt2fast {
namespace {

struct Vec {
  static constexpr int kLanes = 4;
  static constexpr int kRegisters = 32;
  float32x4_t v;

  static Vec zero() { return {vdupq_n_f32(0)}; }
  static Vec broadcast(float x) { return {vdupq_n_f32(x)}; }

  static Vec load(const float* p) { return {vld1q_f32(p)}; }
  static Vec load(const bfloat16* p) { return widen(vld1_u16((const uint16_t*)p)); }
  static Vec load(const float16* p) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p)))}; }
  template <class T>
  static Vec load(const T* p, int n) {
    T buffer[kLanes] = {};
    __builtin_memcpy(buffer, p, size_t(n) * sizeof(T));
    return load(buffer);
  }
  void store(float* p) const { vst1q_f32(p, v); }
  void store(bfloat16* p) const { vst1_u16((uint16_t*)p, narrow()); }
  void store(float16* p) const { vst1_u16((uint16_t*)p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
  template <class T>
  void store(T* p, int n) const {
    T buffer[kLanes];
    store(buffer);
    __builtin_memcpy(p, buffer, size_t(n) * sizeof(T));
  }
  template <class T>
  void stream(T* p) const {
    store(p);
  }

  static Vec widen(uint16x4_t h) { return {vreinterpretq_f32_u32(vshll_n_u16(h, 16))}; }
  uint16x4_t narrow() const {
    uint32x4_t bits = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16);
  }

  friend Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  // Where an operand is NaN, the result is the second operand, as on x86.
  friend Vec max(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
  friend Vec min(Vec a, Vec b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
  friend Vec abs(Vec a) { return {vabsq_f32(a.v)}; }
  friend Vec round(Vec a) { return {vrndnq_f32(a.v)}; }
  friend Vec scale2(Vec a, Vec n) {
    int32x4_t k = vcvtnq_s32_f32(vmaxq_f32(vminq_f32(n.v, vdupq_n_f32(252)), vdupq_n_f32(-252)));
    int32x4_t k1 = vshrq_n_s32(k, 1), k2 = vsubq_s32(k, k1), one = vdupq_n_s32(127);
    float32x4_t s1 = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(k1, one), 23));
    float32x4_t s2 = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(k2, one), 23));
    return {vmulq_f32(vmulq_f32(a.v, s1), s2)};
  }
  friend Vec select_less(Vec a, Vec b, Vec yes, Vec no) { return {vbslq_f32(vcltq_f32(a.v, b.v), yes.v, no.v)}; }
  void store_bytes(int8_t* p) const {
    int16x4_t halves = vmovn_s32(vcvtnq_s32_f32(v));
    int8x8_t bytes = vmovn_s16(vcombine_s16(halves, halves));
    __builtin_memcpy(p, &bytes, 4);
  }
  friend float reduce_add(Vec a) { return vaddvq_f32(a.v); }
  friend float reduce_max(Vec a) { return vmaxvq_f32(a.v); }

  static void transpose(Vec (&r)[kLanes]) {
    float32x4x2_t a = vtrnq_f32(r[0].v, r[1].v), b = vtrnq_f32(r[2].v, r[3].v);
    r[0].v = vcombine_f32(vget_low_f32(a.val[0]), vget_low_f32(b.val[0]));
    r[1].v = vcombine_f32(vget_low_f32(a.val[1]), vget_low_f32(b.val[1]));
    r[2].v = vcombine_f32(vget_high_f32(a.val[0]), vget_high_f32(b.val[0]));
    r[3].v = vcombine_f32(vget_high_f32(a.val[1]), vget_high_f32(b.val[1]));
  }
};

struct Pairs {
  uint32x4_t v;
  static Pairs load(const bfloat16* p) { return {vreinterpretq_u32_u16(vld1q_u16((const uint16_t*)p))}; }
  static Pairs load(const bfloat16* p, int n) {
    bfloat16 buffer[2 * Vec::kLanes] = {};
    __builtin_memcpy(buffer, p, size_t(n) * 2);
    return load(buffer);
  }
  static Pairs broadcast(const bfloat16* p) {
    uint32_t bits;
    __builtin_memcpy(&bits, p, 4);
    return {vdupq_n_u32(bits)};
  }
  static Pairs zip(const bfloat16* a, const bfloat16* b) {
    uint32x4_t low = vmovl_u16(vld1_u16((const uint16_t*)a)), high = vmovl_u16(vld1_u16((const uint16_t*)b));
    return {vorrq_u32(low, vshlq_n_u32(high, 16))};
  }
  void store(bfloat16* p) const { vst1q_u16((uint16_t*)p, vreinterpretq_u16_u32(v)); }
  Vec low() const { return {vreinterpretq_f32_u32(vshlq_n_u32(v, 16))}; }
  Vec high() const { return {vreinterpretq_f32_u32(vandq_u32(v, vdupq_n_u32(0xffff0000u)))}; }
  Vec as_vec() const { return {vreinterpretq_f32_u32(v)}; }
  static Pairs from_vec(Vec a) { return {vreinterpretq_u32_f32(a.v)}; }
  friend Vec dot(Pairs a, Pairs b, Vec acc) { return fma(a.high(), b.high(), fma(a.low(), b.low(), acc)); }
};

struct Ints {
  int32x4_t v;
  static Ints broadcast(int32_t x) { return {vdupq_n_s32(x)}; }
  friend Ints operator+(Ints a, Ints b) { return {vaddq_s32(a.v, b.v)}; }
  Vec as_float() const { return {vcvtq_f32_s32(v)}; }
};

struct SignedBytes {
  int8x16_t v;
  int32x4_t offset;  // 128 times the sum of the four bytes
  static SignedBytes broadcast(int32_t bytes) {
    int8x16_t v = vreinterpretq_s8_s32(vdupq_n_s32(bytes));
    return {v, vshlq_n_s32(vpaddlq_s16(vpaddlq_s8(v)), 7)};
  }
};

struct UnsignedBytes {
  uint8x16_t v;
  static UnsignedBytes load(const uint8_t* p) { return {vld1q_u8(p)}; }
  UnsignedBytes low_halves() const { return {vandq_u8(v, vdupq_n_u8(15))}; }
  UnsignedBytes high_halves() const { return {vshrq_n_u8(v, 4)}; }
  // NEON multiplies bytes of one kind only. With a - 128, which is signed, pairs of products fit into 16 bits.
  friend Ints dot(UnsignedBytes a, SignedBytes b, Ints sum) {
    int8x16_t s = vreinterpretq_s8_u8(veorq_u8(a.v, vdupq_n_u8(128)));
    int16x8_t low = vmull_s8(vget_low_s8(s), vget_low_s8(b.v)), high = vmull_s8(vget_high_s8(s), vget_high_s8(b.v));
    return {vpadalq_s16(vaddq_s32(sum.v, b.offset), vpaddq_s16(low, high))};
  }
};

inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline void stream_fence() {}

}  // namespace
}  // namespace gpt2fast
