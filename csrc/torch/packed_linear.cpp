// int8_linear and int4_linear for CPU tensors: check what the declaration cannot say, allocate y, fill
// PackedLinearArgs, and launch the kernel.
#include "binding.h"

namespace gpt2fast {
namespace {

Tensor run(cpu::Kernel<PackedLinearArgs> cpu::Table::* kernel, const char* op, const Tensor& x, const Tensor& weight,
           const OptionalTensor& scale, const OptionalTensor& bias, int64_t N, const OptionalTensor& residual,
           std::string_view activation) {
  Rows rows(x);
  OptionalRows residual_rows(residual);
  int64_t K = x.size(-1);
  int64_t blocks = (N + kPackedOutputs - 1) / kPackedOutputs, groups = (K + kPackedInputs - 1) / kPackedInputs;
  TORCH_CHECK_VALUE(weight.size(0) == blocks && weight.size(1) == groups, op, ": weight must have ", blocks,
                    " blocks of 16 outputs and ", groups, " groups of 32 inputs for ", N, " outputs and ", K,
                    " inputs, got ", weight.size(0), " and ", weight.size(1));
  auto weight_c = weight.expect_contiguous();
  OptionalTensor bias_c = contiguous(bias), scale_c = contiguous(scale);
  Tensor y = empty_output(with_last(x, N), x.scalar_type());
  PackedLinearArgs args{
      .x = rows.data,
      .bias = data(bias_c),
      .residual = residual_rows.data,
      .weight = weight_c->const_data_ptr<uint8_t>(),
      .scale = data<float>(scale_c),
      .y = y.data_ptr(),
      .M = rows.count,
      .K = K,
      .N = N,
      .stride_x_m = rows.stride,
      .stride_residual_m = residual_rows.stride,
      .activation = activation_of(activation),
      .dtype = dtype_of(x),
  };
  launch(kernel, args);
  return y;
}

Tensor int8_linear(const Tensor& x, const Tensor& weight, const Tensor& scale, const OptionalTensor& bias,
                   const OptionalTensor& residual, std::string_view activation) {
  return run(&cpu::Table::int8_linear, "gpt2fast::int8_linear", x, weight, scale, bias, scale.size(0), residual,
             activation);
}

Tensor int4_linear(const Tensor& x, const Tensor& weight, const Tensor& bias, const OptionalTensor& residual,
                   std::string_view activation) {
  return run(&cpu::Table::int4_linear, "gpt2fast::int4_linear", x, weight, std::nullopt, bias, bias.size(0), residual,
             activation);
}

TORCH_LIBRARY_IMPL(gpt2fast, CPU, m) {
  bind<int8_linear>(m, "int8_linear");
  bind<int4_linear>(m, "int4_linear");
}

}  // namespace
}  // namespace gpt2fast
