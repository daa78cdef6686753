// linear for CPU tensors: allocates the outputs, fills LinearArgs, and launches the kernel.
#include "binding.h"

namespace gpt2fast {
namespace {

// Inference always uses our kernel, whose rows have the same bits in every batch. Training does not need that.
const char* uncovered(const Tensor& x) {
  if (const char* why = uncovered_dtype(x)) return why;
  bool many = x.dim() && x.numel() >= 32 * x.size(-1);
  bool faster = recording_with_amx() && many && x.scalar_type() == at::kBFloat16;
  return faster ? "in training PyTorch's bfloat16 product is faster: it uses AMX" : nullptr;
}

std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                  const OptionalTensor& residual, std::string_view activation, bool transposed,
                                  bool keep_preactivation) {
  // A transposed view of a dense weight is read as the weight it is a view of.
  bool flipped = weight.stride(0) == 1 && weight.stride(1) >= weight.size(0) && weight.stride(1) != 1;
  Tensor held = flipped ? weight.t() : weight.stride(1) == 1 ? weight : weight.contiguous();
  Rows rows(x);
  OptionalRows residual_rows(residual);
  OptionalTensor bias_c = contiguous(bias);
  int64_t K = x.size(-1), N = weight.size(transposed ? 0 : 1);
  Tensor y = empty_output(with_last(x, N), x.scalar_type());
  bool keeps = keep_preactivation && activation != "none";
  Tensor kept = keeps ? empty_output(y.sizes(), x.scalar_type()) : empty_output({0}, x.scalar_type());
  LinearArgs args{
      .x = rows.data,
      .weight = held.const_data_ptr(),
      .bias = data(bias_c),
      .residual = residual_rows.data,
      .y = y.data_ptr(),
      .preactivation = kept.numel() ? kept.data_ptr() : nullptr,
      .M = rows.count,
      .K = K,
      .N = N,
      .stride_x_m = rows.stride,
      .stride_weight = held.stride(0),
      .stride_residual_m = residual_rows.stride,
      .transposed = transposed != flipped,
      .activation = activation_of(activation),
      .dtype = dtype_of(x),
  };
  launch(&cpu::Table::linear, args);
  return {y, kept};
}

TORCH_LIBRARY_IMPL(gpt2fast, CPU, m) { bind<linear>(m, "linear", uncovered); }

}  // namespace
}  // namespace gpt2fast
