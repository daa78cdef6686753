// The two forms of GELU, as formulas over vectors; linear and gelu share them.
//   gelu_tanh(x) = x / (1 + 2^t) with t = -2 log2(e) sqrt(2/pi) (x + 0.044715 x^3)
//   gelu_erf(x) = x Phi(x) with Phi(-a) = 2^(-log2(e) a^2 / 2) N(a) / D(a) for a >= 0, Phi(a) = 1 - Phi(-a)
// The coefficients of the polynomials N and D are minimax fits in float64. Their relative error is noted beside them.
#pragma once
#include "../ops.h"
#include "vecs.h"

namespace gpt2fast {
namespace {

// Whether T needs the formulas of full accuracy. A 16-bit type does not: a relative error of 3e-5 is at most a quarter
// of its rounding step.
template <class T>
constexpr bool kFull = sizeof(T) == 4;
template <class T>
constexpr int kExpDegree = kFull<T> ? 5 : 4;

// Both forms give NaN at NaN and at -infinity (as torch does), infinity at infinity, and -0 far to the left.
template <class T, class V>
GPT2FAST_INLINE V gelu_tanh(V x) {
  constexpr float kLinear = -2.8853900817779268f * kSqrtTwoOverPi;
  V t = x * fma(x * x, V::broadcast(kLinear * kGeluCubic), V::broadcast(kLinear));
  t = min(V::broadcast(150.f), max(V::broadcast(-150.f), t));
  return x / (V::broadcast(1.f) + exp2_in_range<kExpDegree<T>>(t));
}

template <class T, class V>
GPT2FAST_INLINE V gelu_erf(V x) {
  V a = min(V::broadcast(14.5f), abs(x)), one = V::broadcast(1.f), n, d;
  if constexpr (kFull<T>) {  // the error of N / D is 6e-9 for a <= 14.5; all terms are positive
    n = V::broadcast(4.11627407e-3f);
    n = fma(n, a, V::broadcast(4.0633016e-2f));
    n = fma(n, a, V::broadcast(1.83234556e-1f));
    n = fma(n, a, V::broadcast(4.38294233e-1f));
    d = V::broadcast(1.03178492e-2f);
    d = fma(d, a, V::broadcast(1.01858314e-1f));
    d = fma(d, a, V::broadcast(4.69469082e-1f));
    d = fma(d, a, V::broadcast(1.20250083f));
    d = fma(d, a, V::broadcast(1.67447345f));
  } else {  // the error of N / D is 3e-5
    n = V::broadcast(6.19555749e-2f);
    n = fma(n, a, V::broadcast(2.77357519e-1f));
    d = V::broadcast(1.55123547e-1f);
    d = fma(d, a, V::broadcast(7.00355709e-1f));
    d = fma(d, a, V::broadcast(1.35313904f));
  }
  n = fma(n, a, V::broadcast(0.5f));
  d = fma(d, a, one);
  V tail = exp2_in_range<kExpDegree<T>>(a * a * V::broadcast(-0.72134752f)) * n / d;
  return x * select_less(x, V::broadcast(0.f), tail, one - tail);
}

template <Activation kActivation, class T, class V>
GPT2FAST_INLINE V activate(V x) {
  if constexpr (kActivation == Activation::kGeluTanh) return gelu_tanh<T>(x);
  if constexpr (kActivation == Activation::kGeluErf) return gelu_erf<T>(x);
  return x;
}

template <Activation kActivation>
struct ActivationTag {
  static constexpr Activation value = kActivation;
};

template <class F>
inline void with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::kNone:
      return f(ActivationTag<Activation::kNone>{});
    case Activation::kGeluTanh:
      return f(ActivationTag<Activation::kGeluTanh>{});
    case Activation::kGeluErf:
      return f(ActivationTag<Activation::kGeluErf>{});
  }
}

}  // namespace
}  // namespace gpt2fast
