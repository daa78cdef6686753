// Number formats: conversions among float16, bfloat16, float32 and float64, rounded correctly in every mode.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace gpt2fast::ptx {

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

constexpr int kNearest = 0, kZero = 1, kDown = 2, kUp = 3, kAway = 4;  // rounding: .rn .rz .rm .rp .rna

// (-1)^negative * m * 2^scale as a float of E exponent and M mantissa bits. sticky: a bit below m is set.
template <int E, int M>
inline uint64_t narrow_parts(bool negative, uint64_t m, int scale, int mode, bool sticky = false) {
  constexpr int kBias = (1 << (E - 1)) - 1;
  constexpr uint64_t kInfinity = uint64_t((1 << E) - 1) << M;
  uint64_t sign = uint64_t(negative) << (E + M);
  if (m == 0) return sign;
  int lead = __builtin_clzll(m);
  m <<= lead;
  int exponent = scale - lead + 63;  // of the leading bit
  int shift = 63 - M + (exponent < 1 - kBias ? 1 - kBias - exponent : 0);
  uint64_t kept = shift > 63 ? 0 : m >> shift;
  uint64_t rest = shift > 63 ? m : m & ((uint64_t{1} << shift) - 1);
  bool inexact = rest != 0 || sticky;
  bool above = false, half = false;  // rest against half a unit
  if (shift <= 64) {
    uint64_t unit = uint64_t{1} << (shift - 1);
    half = rest == unit && !sticky;
    above = rest > unit || (rest == unit && sticky);
  }
  bool up = mode == kNearest ? above || (half && (kept & 1))
            : mode == kAway  ? above || half
            : mode == kDown  ? negative && inexact
            : mode == kUp    ? !negative && inexact
                             : false;
  uint64_t bits = kept + up;
  if (exponent >= 1 - kBias) bits += uint64_t(exponent + kBias - 1) << M;
  if (exponent > kBias || bits >= kInfinity) {
    bool to_infinity = mode == kNearest || mode == kAway || (mode == kDown && negative) || (mode == kUp && !negative);
    bits = to_infinity ? kInfinity : kInfinity - 1;
  }
  return sign | bits;
}

// A double as a float of E exponent and M mantissa bits. The bits of a NaN are all ones, except for the sign.
template <int E, int M>
inline uint64_t narrow(double x, int mode = kNearest) {
  auto bits = bit_cast<uint64_t>(x);
  bool negative = bits >> 63;
  uint64_t mantissa = bits & ((uint64_t{1} << 52) - 1);
  int exponent = int(bits >> 52 & 2047);
  if (exponent == 2047) {
    if (mantissa) return (uint64_t{1} << (E + M)) - 1;
    return uint64_t(negative) << (E + M) | uint64_t((1 << E) - 1) << M;
  }
  if (exponent == 0) return narrow_parts<E, M>(negative, mantissa, -1074, mode);
  return narrow_parts<E, M>(negative, mantissa | uint64_t{1} << 52, exponent - 1075, mode);
}

inline float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = uint32_t(h & 0x7fff) << 13;
  // A multiplication rebases the exponent, which is right for subnormals too. Infinities and NaNs get all exponent
  // bits.
  float f = bit_cast<float>(magnitude) * 0x1p112f;
  uint32_t bits = bit_cast<uint32_t>(f) | (magnitude >= 0x0f800000u ? 0x7f800000u : 0);
  return bit_cast<float>(bits | sign);
}

// Rounds to nearest even. NaN becomes 0x7fff.
inline uint16_t float_to_half(float x) {
  auto bits = bit_cast<uint32_t>(x);
  uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  // Below 2^-14 the sum with 0.5 rounds at the subnormal's last bit; above, the carry rounds the mantissa.
  uint32_t small = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1) - 0x38000000u) >> 13;
  uint32_t h = magnitude < 0x38800000u ? small : normal;
  h = magnitude >= 0x477ff000u ? 0x7c00u : h;
  h = magnitude > 0x7f800000u ? 0x7fffu : h;
  sign = magnitude > 0x7f800000u ? 0 : sign;
  return uint16_t(sign | h);
}

inline float bfloat_to_float(uint16_t b) { return bit_cast<float>(uint32_t(b) << 16); }

inline uint16_t float_to_bfloat(float x) {
  auto bits = bit_cast<uint32_t>(x);
  uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000u ? uint16_t{0x7fff} : uint16_t(rounded);
}

// x + y rounded to odd: rounding it again to a shorter format gives what rounding the exact sum would.
inline double add_to_odd(double x, double y) {
  double s = x + y, v = s - x, error = (x - (s - v)) + (y - v);
  auto bits = bit_cast<uint64_t>(s);
  if (error != 0 && error == error && !(bits & 1)) bits += (error > 0) == (s > 0) ? 1 : uint64_t(-1);
  return bit_cast<double>(bits);
}

constexpr uint32_t kNanBits = 0x7fffffffu;
inline float canonical(float x) { return x != x ? bit_cast<float>(kNanBits) : x; }
inline double canonical(double x) { return x; }
inline float flush(float x) {
  auto bits = bit_cast<uint32_t>(x);
  return bit_cast<float>((bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits);
}
inline double flush(double x) { return x; }
template <class T>
inline T saturate(T x) {
  return x > T(0) ? (x < T(1) ? x : T(1)) : T(0);  // NaN becomes +0 too
}

// PTX's min and max. -0 is below +0. A number wins over NaN; with .nan, NaN wins.
template <class T>
inline T minimum(T a, T b, bool nan) {
  bool a_nan = a != a, b_nan = b != b;
  T least = a < b || (a == b && std::signbit(a)) ? a : b;
  T number = a_nan ? b : b_nan ? a : least;
  return canonical(nan && (a_nan || b_nan) ? T(NAN) : number);
}
template <class T>
inline T maximum(T a, T b, bool nan) {
  bool a_nan = a != a, b_nan = b != b;
  T most = a > b || (a == b && !std::signbit(a)) ? a : b;
  T number = a_nan ? b : b_nan ? a : most;
  return canonical(nan && (a_nan || b_nan) ? T(NAN) : number);
}

}  // namespace gpt2fast::ptx
