// RMSNorm for torch's tensors. A call was checked before, by what the op's declaration in Python says.
#include "torch/binding.h"

#include "args.h"

GPT2FAST_CPU_KERNEL(rms_norm, RmsNormArgs)

namespace {

using namespace gpt2fast;

std::tuple<Tensor, Tensor> run(const Tensor& x, const Tensor& weight, double eps) {
  Rows rows(x);
  auto weight_c = weight.expect_contiguous();
  Tensor y = empty_output(x.sizes(), x.scalar_type());
  Tensor rstd = empty_output(x.sizes().slice(0, x.dim() - 1), at::kFloat);
  RmsNormArgs args{
      .x = rows.data,
      .weight = weight_c->const_data_ptr(),
      .y = y.data_ptr(),
      .rstd = rstd.data_ptr<float>(),
      .R = rows.count,
      .C = x.size(-1),
      .stride_x_r = rows.stride,
      .eps = float(eps),
      .dtype = dtype_of(x),
  };
  launch(rms_norm, args);
  return {y, rstd};
}

TORCH_LIBRARY_IMPL(examples, CPU, m) { bind<run>(m, "rms_norm"); }

}  // namespace
