// Results of +, *, fma, / and square roots in float32, rounded in any mode. The exact result is first rounded to odd,
// as a double. Rounding that to float32 gives the same as rounding the exact result once.
#pragma once
#include "numbers.h"

namespace gpt2fast::ptx {

// x + rest, rounded to odd, where x is a double and rest is the small part that x leaves out.
inline double to_odd(double x, double rest) {
  auto bits = bit_cast<uint64_t>(x);
  if (rest == 0 || rest != rest || (bits & 1) || (bits << 1 >> 53) == 2047) return x;
  bool grows = (rest > 0) == (bits >> 63 == 0);
  return bit_cast<double>(grows ? bits + 1 : bits - 1);
}

template <int kMode>
inline float round_to_float(double x) {
  return bit_cast<float>(uint32_t(narrow<8, 23>(x, kMode)));
}

template <int kMode>
inline float add_rounded(float a, float b) {
  float exact_zero = kMode == kDown ? -0.0f : 0.0f;  // the result of x - x
  if (a == -b && a != 0 && std::isfinite(a)) return exact_zero;
  if (a == 0 && b == 0 && std::signbit(a) != std::signbit(b)) return exact_zero;
  return round_to_float<kMode>(add_to_odd(a, b));
}

template <int kMode>
inline float multiply_rounded(float a, float b) {
  return round_to_float<kMode>(double(a) * double(b));
}

template <int kMode>
inline float fma_rounded(float a, float b, float c) {
  double product = double(a) * double(b);
  if (product == -double(c) && std::isfinite(c)) {
    bool same_sign = std::signbit(product) == std::signbit(c);
    if (product != 0 || !same_sign) return kMode == kDown ? -0.0f : 0.0f;
  }
  return round_to_float<kMode>(add_to_odd(product, c));
}

template <int kMode>
inline float divide_rounded(float a, float b) {
  double q = double(a) / double(b);
  double rest = std::fma(-q, double(b), double(a));
  return round_to_float<kMode>(to_odd(q, b < 0 ? -rest : rest));
}

template <int kMode>
inline float root_rounded(float a) {
  double r = std::sqrt(double(a));
  return round_to_float<kMode>(to_odd(r, std::fma(-r, r, double(a))));
}

}  // namespace gpt2fast::ptx
