// gelu and bias_gelu. Both run one kernel, which adds the bias if there is one.
#include "binding.h"

namespace gpt2fast {
namespace {

Tensor activate(const Tensor& x, const OptionalTensor& bias, std::string_view approximate) {
  Rows rows(x);
  OptionalTensor bias_c = contiguous(bias);
  Tensor y = empty_output(x.sizes(), x.scalar_type());
  GeluArgs args{
      .x = rows.data,
      .bias = data(bias_c),
      .y = y.data_ptr(),
      .R = rows.count,
      .C = x.size(-1),
      .stride_x_r = rows.stride,
      .activation = approximate == "tanh" ? Activation::kGeluTanh : Activation::kGeluErf,
      .dtype = dtype_of(x),
  };
  launch(&cpu::Table::gelu, args);
  return y;
}

Tensor gelu(const Tensor& x, std::string_view approximate) { return activate(x, {}, approximate); }

Tensor bias_gelu(const Tensor& x, const Tensor& bias, std::string_view approximate) {
  return activate(x, bias, approximate);
}

TORCH_LIBRARY_IMPL(gpt2fast, CPU, m) {
  bind<gelu>(m, "gelu");
  bind<bias_gelu>(m, "bias_gelu");
}

}  // namespace
}  // namespace gpt2fast
