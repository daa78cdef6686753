// layer_norm and add_layer_norm. Both run one kernel, which adds the residual if there is one.
#include "binding.h"

namespace gpt2fast {
namespace {

struct Normalised {
  Tensor y, sum, mean, rstd;
};

Normalised normalise(const Tensor& x, const OptionalTensor& residual, const Tensor& weight, const Tensor& bias,
                     double eps) {
  Rows rows(x);
  OptionalRows residual_rows(residual);
  auto weight_c = weight.expect_contiguous(), bias_c = bias.expect_contiguous();
  auto leading = x.sizes().slice(0, x.dim() - 1);
  Normalised out{
      .y = empty_output(x.sizes(), x.scalar_type()),
      .sum = residual ? empty_output(x.sizes(), x.scalar_type()) : Tensor(),
      .mean = empty_output(leading, at::kFloat),
      .rstd = empty_output(leading, at::kFloat),
  };
  LayerNormArgs args{
      .x = rows.data,
      .residual = residual_rows.data,
      .weight = weight_c->const_data_ptr(),
      .bias = bias_c->const_data_ptr(),
      .y = out.y.data_ptr(),
      .sum = residual ? out.sum.data_ptr() : nullptr,
      .mean = out.mean.data_ptr<float>(),
      .rstd = out.rstd.data_ptr<float>(),
      .R = rows.count,
      .C = x.size(-1),
      .stride_x_r = rows.stride,
      .stride_residual_r = residual_rows.stride,
      .eps = float(eps),
      .dtype = dtype_of(x),
  };
  launch(&cpu::Table::layer_norm, args);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  Normalised out = normalise(x, {}, weight, bias, eps);
  return {out.y, out.mean, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                          const Tensor& bias, double eps) {
  Normalised out = normalise(x, residual, weight, bias, eps);
  return {out.y, out.sum, out.mean, out.rstd};
}

TORCH_LIBRARY_IMPL(gpt2fast, CPU, m) {
  bind<layer_norm>(m, "layer_norm");
  bind<add_layer_norm>(m, "add_layer_norm");
}

}  // namespace
}  // namespace gpt2fast
