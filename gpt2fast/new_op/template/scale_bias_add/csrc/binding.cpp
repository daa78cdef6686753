// From torch's tensors to the kernel. The call was checked before, by what the op's declaration in Python says.
#include "torch/binding.h"

#include "args.h"

GPT2FAST_CPU_KERNEL(scale_bias_add, ScaleBiasAddArgs)

namespace {

using namespace gpt2fast;

Tensor run(const Tensor& x, const Tensor& scale, const Tensor& bias, const Tensor& residual) {
  Rows rows(x), residual_rows(residual);  // copies only where strides ask for them
  auto scale_c = scale.expect_contiguous(), bias_c = bias.expect_contiguous();
  Tensor y = empty_output(x.sizes(), x.scalar_type());
  ScaleBiasAddArgs args{
      .x = rows.data,
      .scale = scale_c->const_data_ptr(),
      .bias = bias_c->const_data_ptr(),
      .residual = residual_rows.data,
      .y = y.data_ptr(),
      .R = rows.count,
      .C = x.size(-1),
      .stride_x_r = rows.stride,
      .stride_residual_r = residual_rows.stride,
      .dtype = dtype_of(x),
  };
  launch(scale_bias_add, args);
  return y;
}

TORCH_LIBRARY_IMPL(scale_bias_add, CPU, m) { bind<run>(m, "scale_bias_add"); }

}  // namespace
