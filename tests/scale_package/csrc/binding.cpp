#include "torch/binding.h"

#include "args.h"

GPT2FAST_CPU_KERNEL(scale_bias_add, ScaleBiasAddArgs)

namespace {

using namespace gpt2fast;

Tensor run(const Tensor& x, const Tensor& scale, const Tensor& bias, const Tensor& residual) {
  Rows rows(x), residual_rows(residual);
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

// Ops without a kernel of their own: one in place, one of integers with two outputs.
void scale_(Tensor& x, double factor, std::optional<int64_t> times) { x.mul_(factor * double(times.value_or(1))); }

std::tuple<Tensor, Tensor> next_two(const Tensor& tokens) { return {tokens.add(1), tokens.add(2)}; }

TORCH_LIBRARY_IMPL(scale_package, CPU, m) {
  bind<run>(m, "scale_bias_add");
  bind<scale_>(m, "scale_");
  bind<next_two>(m, "next_two");
}

}  // namespace
