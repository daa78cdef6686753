// Vec for AVX2 with FMA and F16C. See vec_avx512.h for what each operation means.
#pragma once
#include <immintrin.h>

#include "../dtype.h"

namespace gpt2fast {
namespace {

struct Vec {
  static constexpr int kLanes = 8;
  static constexpr int kRegisters = 16;
  __m256 v;

  static __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec broadcast(float x) { return {_mm256_set1_ps(x)}; }

  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const bfloat16* p) { return widen(_mm_loadu_si128((const __m128i*)p)); }
  static Vec load(const float16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
  static Vec load(const float* p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
  static Vec load(const bfloat16* p, int n) { return widen(load16(p, n)); }
  static Vec load(const float16* p, int n) { return {_mm256_cvtph_ps(load16(p, n))}; }

  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bfloat16* p) const { _mm_storeu_si128((__m128i*)p, narrow()); }
  void store(float16* p) const { _mm_storeu_si128((__m128i*)p, half()); }
  void store(float* p, int n) const { _mm256_maskstore_ps(p, first(n), v); }
  void store(bfloat16* p, int n) const { store16(p, n, narrow()); }
  void store(float16* p, int n) const { store16(p, n, half()); }
  void stream(float* p) const { _mm256_stream_ps(p, v); }  // p aligned to 32 bytes
  void stream(bfloat16* p) const { _mm_stream_si128((__m128i*)p, narrow()); }
  void stream(float16* p) const { _mm_stream_si128((__m128i*)p, half()); }

  static __m128i load16(const void* p, int n) {
    uint16_t buffer[8] = {};
    __builtin_memcpy(buffer, p, size_t(n) * 2);
    return _mm_loadu_si128((const __m128i*)buffer);
  }
  static void store16(void* p, int n, __m128i x) {
    uint16_t buffer[8];
    _mm_storeu_si128((__m128i*)buffer, x);
    __builtin_memcpy(p, buffer, size_t(n) * 2);
  }
  static Vec widen(__m128i h) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))}; }
  __m128i half() const { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  __m128i narrow() const {
    __m256i bits = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    rounded = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
    rounded = _mm256_srli_epi32(rounded, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  }

  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  friend Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  friend Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  friend Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), a.v)}; }
  friend Vec round(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  friend Vec scale2(Vec a, Vec n) {  // multiplies twice, so that subnormal results and 2^128 are right
    __m256i k = _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(n.v, _mm256_set1_ps(252)), _mm256_set1_ps(-252)));
    __m256i k1 = _mm256_srai_epi32(k, 1), k2 = _mm256_sub_epi32(k, k1), one = _mm256_set1_epi32(127);
    __m256 s1 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(k1, one), 23));
    __m256 s2 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(k2, one), 23));
    return {_mm256_mul_ps(_mm256_mul_ps(a.v, s1), s2)};
  }
  friend Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
  }
  void store_bytes(int8_t* p) const {
    __m256i words = _mm256_cvtps_epi32(v);
    __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(halves, halves));
  }
  friend float reduce_add(Vec a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  friend float reduce_max(Vec a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
  }

  static void transpose(Vec (&r)[kLanes]) {
    __m256 t[8], u[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
      t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
    }
    for (int i = 0; i < 8; i += 4) {
      u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      r[i].v = _mm256_permute2f128_ps(u[i], u[4 + i], 0x20);
      r[4 + i].v = _mm256_permute2f128_ps(u[i], u[4 + i], 0x31);
    }
  }
};

struct Pairs {
  __m256i v;
  static Pairs load(const bfloat16* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
  static Pairs load(const bfloat16* p, int n) {
    uint16_t buffer[16] = {};
    __builtin_memcpy(buffer, p, size_t(n) * 2);
    return {_mm256_loadu_si256((const __m256i*)buffer)};
  }
  static Pairs broadcast(const bfloat16* p) {
    int32_t bits;
    __builtin_memcpy(&bits, p, 4);
    return {_mm256_set1_epi32(bits)};
  }
  static Pairs zip(const bfloat16* a, const bfloat16* b) {
    __m256i low = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)a));
    __m256i high = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)b));
    return {_mm256_or_si256(low, _mm256_slli_epi32(high, 16))};
  }
  void store(bfloat16* p) const { _mm256_storeu_si256((__m256i*)p, v); }
  Vec low() const { return {_mm256_castsi256_ps(_mm256_slli_epi32(v, 16))}; }
  Vec high() const { return {_mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(int(0xffff0000))))}; }
  Vec as_vec() const { return {_mm256_castsi256_ps(v)}; }
  static Pairs from_vec(Vec a) { return {_mm256_castps_si256(a.v)}; }
  friend Vec dot(Pairs a, Pairs b, Vec acc) { return fma(a.high(), b.high(), fma(a.low(), b.low(), acc)); }
};

struct Ints {
  __m256i v;
  static Ints broadcast(int32_t x) { return {_mm256_set1_epi32(x)}; }
  friend Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
  Vec as_float() const { return {_mm256_cvtepi32_ps(v)}; }
};

struct SignedBytes {
  __m256i even, odd;  // bytes 0 and 2, and bytes 1 and 3, as integers of 16 bits
  static SignedBytes broadcast(int32_t bytes) {
    __m256i v = _mm256_set1_epi32(bytes);
    return {_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), _mm256_srai_epi16(v, 8)};
  }
};

struct UnsignedBytes {
  __m256i v;
  static UnsignedBytes load(const uint8_t* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
  UnsignedBytes low_halves() const { return {_mm256_and_si256(v, _mm256_set1_epi8(15))}; }
  UnsignedBytes high_halves() const { return {_mm256_and_si256(_mm256_srli_epi16(v, 4), _mm256_set1_epi8(15))}; }
  friend Ints dot(UnsignedBytes a, SignedBytes b, Ints sum) {
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(a.v, _mm256_set1_epi16(255)), b.even);
    return {_mm256_add_epi32(_mm256_add_epi32(sum.v, even), _mm256_madd_epi16(_mm256_srli_epi16(a.v, 8), b.odd))};
  }
};

inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
inline void stream_fence() { _mm_sfence(); }

}  // namespace
}  // namespace gpt2fast
