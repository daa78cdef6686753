#pragma once
#include "dtype.h"

namespace gpt2fast {

// y (R, C) = x * scale + bias + residual. The rows of x and of residual lie at strides, counted in elements.
struct ScaleBiasAddArgs {
  const void *x, *scale, *bias, *residual;
  void* y;
  int64_t R, C;
  int64_t stride_x_r, stride_residual_r;
  DType dtype;
};

}  // namespace gpt2fast
