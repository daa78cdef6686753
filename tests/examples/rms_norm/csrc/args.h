#pragma once
#include "dtype.h"

namespace gpt2fast {

// y (R, C) = x rstd weight, rstd (R) = 1 / sqrt(mean(x^2) + eps). The rows of x lie at a stride, counted in elements.
struct RmsNormArgs {
  const void *x, *weight;
  void* y;
  float* rstd;
  int64_t R, C, stride_x_r;
  float eps;
  DType dtype;
};

}  // namespace gpt2fast
