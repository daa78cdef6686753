// sample for CPU tensors: allocates out, fills SampleArgs, and launches the kernel.
#include "binding.h"

namespace gpt2fast {
namespace {

Tensor sample(const Tensor& logits, const Tensor& seed, const Tensor& positions, const OptionalTensor& tokens,
              const OptionalTensor& rows, double temperature, int64_t top_k, double top_p, double min_p,
              double repetition_penalty) {
  Tensor logits_d = dense_inside(logits), seed_c = seed.contiguous(), positions_c = positions.contiguous();
  OptionalTensor tokens_d = dense_inside(tokens), rows_c = contiguous(rows);
  int64_t B = logits.size(0);
  Tensor out = empty_output({B}, at::kLong);
  SampleArgs args{
      .logits = logits_d.const_data_ptr(),
      .tokens = data<int64_t>(tokens_d),
      .seed = seed_c.const_data_ptr<int64_t>(),
      .positions = positions_c.const_data_ptr<int64_t>(),
      .rows = data<int64_t>(rows_c),
      .out = out.data_ptr<int64_t>(),
      .B = B,
      .T = tokens ? tokens->size(1) : 0,
      .V = logits.size(1),
      .stride_logits_b = logits_d.stride(0),
      .stride_tokens_b = tokens ? tokens_d->stride(0) : 0,
      .temperature = float(temperature),
      .top_p = float(top_p),
      .min_p = float(min_p),
      .repetition_penalty = float(repetition_penalty),
      .top_k = top_k,
      .dtype = dtype_of(logits),
  };
  launch(&cpu::Table::sample, args);
  return out;
}

TORCH_LIBRARY_IMPL(gpt2fast, CPU, m) { bind<sample>(m, "sample"); }

}  // namespace
}  // namespace gpt2fast
