// Vec, a vector of float32 lanes, for AVX-512 (F, BW, DQ, VL). The other vec headers have the same functions for other
// instruction sets; what the functions mean is said here. load and store convert bfloat16 and float16 from and to
// float32. With an argument n they touch the first n elements only, and the other lanes are loaded as zeros. stream
// stores past the caches if the instruction set can; p must be aligned to the bytes stored. Pairs has dot products of
// bfloat16, which use VDPBF16PS if compiled for AVX512-BF16.
#pragma once
// GCC's own header leaves lanes uninitialised that a mask fills later, and GCC warns of them wherever the header is
// used (GCC bug 105593). The warnings are off for that header only, not for our code.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include "../dtype.h"

namespace gpt2fast {
namespace {

struct Vec {
  static constexpr int kLanes = 16;
  static constexpr int kRegisters = 32;
  __m512 v;

  static __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }

  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const bfloat16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
  static Vec load(const float16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
  static Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static Vec load(const bfloat16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }
  static Vec load(const float16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))}; }

  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bfloat16* p) const { _mm256_storeu_si256((__m256i*)p, narrow()); }
  void store(float16* p) const { _mm256_storeu_si256((__m256i*)p, half()); }
  void store(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  void store(bfloat16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), narrow()); }
  void store(float16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), half()); }
  void stream(float* p) const { _mm512_stream_ps(p, v); }  // p aligned to 64 bytes
  void stream(bfloat16* p) const { _mm256_stream_si256((__m256i*)p, narrow()); }
  void stream(float16* p) const { _mm256_stream_si256((__m256i*)p, half()); }

  static Vec widen(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
  __m256i half() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  __mmask16 subnormal() const { return _mm512_fpclass_ps_mask(v, 0x20); }
  __m256i narrow() const {
#ifdef __AVX512BF16__  // VCVTNEPS2BF16 flushes subnormals to zero, so they take the other way
    if (__builtin_expect(!subnormal(), 1)) return (__m256i)_mm512_cvtneps_pbh(v);
#endif
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }

  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c, rounded once
  friend Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
  friend Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
  friend Vec round(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
  // a * 2^n for an integral n, with correct subnormal results and overflow
  friend Vec scale2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
  // lane-wise: a < b ? yes : no
  friend Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
  }
  // the lanes rounded to integers, which lie in [-128, 127], as bytes
  void store_bytes(int8_t* p) const { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v))); }
  friend float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
  friend float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }

  // Lane i of row j becomes lane j of row i.
  static void transpose(Vec (&r)[kLanes]) {
    __m512 t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
      t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
    }
    __m512 u[16];
    for (int i = 0; i < 16; i += 4) {
      u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
      u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
      u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {  // u[4g + i]: column i of rows 4g..4g+3, one 128-bit lane per column group
      __m512 a = _mm512_shuffle_f32x4(u[i], u[4 + i], 0x88), b = _mm512_shuffle_f32x4(u[i], u[4 + i], 0xdd);
      __m512 c = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0x88), d = _mm512_shuffle_f32x4(u[8 + i], u[12 + i], 0xdd);
      r[i].v = _mm512_shuffle_f32x4(a, c, 0x88);
      r[4 + i].v = _mm512_shuffle_f32x4(b, d, 0x88);
      r[8 + i].v = _mm512_shuffle_f32x4(a, c, 0xdd);
      r[12 + i].v = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
  }
};

// kLanes pairs of bfloat16: lane i holds elements 2i (low half) and 2i + 1.
struct Pairs {
  __m512i v;
  static Pairs load(const bfloat16* p) { return {_mm512_loadu_si512(p)}; }
  static Pairs load(const bfloat16* p, int n) {  // the first n elements, others zero; n <= 2 kLanes
    return {_mm512_maskz_loadu_epi16(n >= 32 ? ~__mmask32(0) : (__mmask32(1) << n) - 1, p)};
  }
  static Pairs broadcast(const bfloat16* p) {  // p[0], p[1] in every lane
    int32_t bits;
    __builtin_memcpy(&bits, p, 4);
    return {_mm512_set1_epi32(bits)};
  }
  // lane i = (a[i], b[i]): interleaves two rows of kLanes elements
  static Pairs zip(const bfloat16* a, const bfloat16* b) {
    __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)a));
    __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)b));
    return {_mm512_or_si512(low, _mm512_slli_epi32(high, 16))};
  }
  void store(bfloat16* p) const { _mm512_storeu_si512(p, v); }
  Vec low() const { return {_mm512_castsi512_ps(_mm512_slli_epi32(v, 16))}; }
  Vec high() const { return {_mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(int(0xffff0000))))}; }
  Vec as_vec() const { return {_mm512_castsi512_ps(v)}; }  // the same 32-bit lanes, for transpose
  static Pairs from_vec(Vec a) { return {_mm512_castps_si512(a.v)}; }
  // acc + a.low * b.low + a.high * b.high
  friend Vec dot(Pairs a, Pairs b, Vec acc) {
#ifdef __AVX512BF16__
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)};
#else
    return fma(a.high(), b.high(), fma(a.low(), b.low(), acc));
#endif
  }
};

// kLanes integers of 32 bits.
struct Ints {
  __m512i v;
  static Ints broadcast(int32_t x) { return {_mm512_set1_epi32(x)}; }
  friend Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
  Vec as_float() const { return {_mm512_cvtepi32_ps(v)}; }
};

// The same four signed bytes for every lane, one factor of dot(). They must not be -128.
struct SignedBytes {
#ifdef __AVX512VNNI__
  __m512i v;
  static SignedBytes broadcast(int32_t bytes) { return {_mm512_set1_epi32(bytes)}; }
#else
  __m512i even, odd;  // bytes 0 and 2, and bytes 1 and 3, as integers of 16 bits
  static SignedBytes broadcast(int32_t bytes) {
    __m512i v = _mm512_set1_epi32(bytes);
    return {_mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8), _mm512_srai_epi16(v, 8)};
  }
#endif
};

// Four unsigned bytes in each of kLanes lanes, the other factor of dot().
struct UnsignedBytes {
  __m512i v;
  static UnsignedBytes load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
  UnsignedBytes low_halves() const { return {_mm512_and_si512(v, _mm512_set1_epi8(15))}; }  // the low 4 bits of each
  UnsignedBytes high_halves() const { return {_mm512_and_si512(_mm512_srli_epi16(v, 4), _mm512_set1_epi8(15))}; }
  // sum + the products of the four bytes of each lane, exact; VPDPBUSD if compiled for AVX512-VNNI
  friend Ints dot(UnsignedBytes a, SignedBytes b, Ints sum) {
#ifdef __AVX512VNNI__
    return {_mm512_dpbusd_epi32(sum.v, a.v, b.v)};
#else
    __m512i even = _mm512_madd_epi16(_mm512_and_si512(a.v, _mm512_set1_epi16(255)), b.even);
    return {_mm512_add_epi32(_mm512_add_epi32(sum.v, even), _mm512_madd_epi16(_mm512_srli_epi16(a.v, 8), b.odd))};
#endif
  }
};

inline void lane_sums(const Vec (&v)[8], float* out) {
  auto add = [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); };
  __m512 t[4], u[2];
  for (int i = 0; i < 4; ++i)
    t[i] = add(_mm512_unpacklo_ps(v[2 * i].v, v[2 * i + 1].v), _mm512_unpackhi_ps(v[2 * i].v, v[2 * i + 1].v));
  for (int i = 0; i < 2; ++i)
    u[i] = add(_mm512_shuffle_ps(t[2 * i], t[2 * i + 1], 0x44), _mm512_shuffle_ps(t[2 * i], t[2 * i + 1], 0xee));
  __m512 w = add(_mm512_shuffle_f32x4(u[0], u[1], 0x88), _mm512_shuffle_f32x4(u[0], u[1], 0xdd));
  w = add(_mm512_shuffle_f32x4(w, w, 0x08), _mm512_shuffle_f32x4(w, w, 0x0d));
  _mm256_storeu_ps(out, _mm512_castps512_ps256(w));
}

#ifdef __AVX512BF16__
inline void store_pair(Vec a, Vec b, bfloat16* p) {
  if (__builtin_expect(_mm512_kortestz(a.subnormal(), b.subnormal()), 1)) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v));
  } else {
    a.store(p);
    b.store(p + Vec::kLanes);
  }
}
#endif

inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
inline void stream_fence() { _mm_sfence(); }

}  // namespace
}  // namespace gpt2fast
