// GELU and its derivative, in float32.
//
//   tanh form:  x (1 + tanh(u)) / 2 = x / (1 + e^(-2 u)), with u = sqrt(2 / pi) (x + 0.044715 x^3)
//   exact form: x (1 + erf(x / sqrt(2))) / 2
//
// The tanh form is computed by the quotient, which is accurate in both tails; 1 + tanh(u) has no digits left in the
// lower one.
#pragma once
#include "../math.h"
#include "../ops.h"
#include "device.cuh"

namespace gpt2fast::cuda {

constexpr float kDensityAt0 = 0.3989422804014327f;  // density of the standard normal distribution at 0
constexpr float kFlat = 10;  // above it the derivative is 1 in float32; below -kFlat its magnitude is less than 1e-20

// e^(-2 u)
__device__ __forceinline__ float odds(float x) {
  constexpr float kLinear = -2 * kLog2E * kSqrtTwoOverPi;
  return exp2f(x * (kLinear + kLinear * kGeluCubic * (x * x)));
}

template <Activation kForm>
__device__ __forceinline__ float activate(float x) {
  if constexpr (kForm == Activation::kGeluTanh) {
    return __fdividef(x, 1 + odds(x));
  } else if constexpr (kForm == Activation::kGeluErf) {
    return x * (0.5f + 0.5f * erff(x * kSqrtHalf));
  } else {
    return x;
  }
}

template <Activation kForm>
__device__ __forceinline__ float derivative(float x) {
  // Powers of larger numbers would overflow, and infinity times 0 is NaN.
  const float near = x > kFlat ? kFlat : x < -kFlat ? -kFlat : x;
  float share, slope;
  if constexpr (kForm == Activation::kGeluTanh) {
    constexpr float kTwiceSlope = 2 * kSqrtTwoOverPi;
    const float e = odds(near);
    share = __fdividef(1, 1 + e);
    // share e is 1 - share, but the difference would have no digits left where share is near 1.
    slope = near * (share * (share * e)) * (kTwiceSlope + 3 * kGeluCubic * kTwiceSlope * (near * near));
  } else {
    static_assert(kForm == Activation::kGeluErf);
    share = 0.5f + 0.5f * erff(near * kSqrtHalf);
    slope = near * kDensityAt0 * exp2f(-0.5f * kLog2E * (near * near));
  }
  return x < -kFlat ? 0 : share + slope;
}

}  // namespace gpt2fast::cuda
