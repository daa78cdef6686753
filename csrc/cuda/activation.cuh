// GELU and its derivative, of float32. The tanh form is x / (1 + e^(-2 u)), u = sqrt(2/pi) (x + 0.044715 x^3): exact in
// both tails, where 1 + tanh(u) has no digits left.
#pragma once
#include "../math.h"
#include "../ops.h"
#include "device.cuh"

namespace gpt2fast::cuda {

constexpr float kDensityAt0 = 0.3989422804014327f;  // of the normal distribution
constexpr float kFlat = 10;  // from here on the derivative is 1, and below 1e-20 on the other side

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
  const float near = x > kFlat ? kFlat : x < -kFlat ? -kFlat : x;  // powers of larger ones overflow beside factors of 0
  float share, slope;
  if constexpr (kForm == Activation::kGeluTanh) {
    constexpr float kTwiceSlope = 2 * kSqrtTwoOverPi;
    const float e = odds(near);
    share = __fdividef(1, 1 + e);
    // share (1 - share), without the difference, which has no digits left where share is near 1.
    slope = near * (share * (share * e)) * (kTwiceSlope + 3 * kGeluCubic * kTwiceSlope * (near * near));
  } else {
    static_assert(kForm == Activation::kGeluErf);
    share = 0.5f + 0.5f * erff(near * kSqrtHalf);
    slope = near * kDensityAt0 * exp2f(-0.5f * kLog2E * (near * near));
  }
  return x < -kFlat ? 0 : share + slope;
}

}  // namespace gpt2fast::cuda
