// decode_attention for CPU tensors: allocates out, fills DecodeAttentionArgs, and launches the kernel.
#include "binding.h"

namespace gpt2fast {
namespace {

Tensor decode_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lengths,
                        const OptionalTensor& starts, int64_t window, std::optional<double> scale) {
  Tensor q_d = dense_inside(q), k_d = dense_inside(k), v_d = dense_inside(v), lengths_c = lengths.contiguous();
  OptionalTensor starts_c = contiguous(starts);
  Tensor out = empty_output(q.sizes(), q.scalar_type());
  DecodeAttentionArgs args{
      .q = q_d.const_data_ptr(),
      .k = k_d.const_data_ptr(),
      .v = v_d.const_data_ptr(),
      .lengths = lengths_c.const_data_ptr<int64_t>(),
      .starts = data<int64_t>(starts_c),
      .out = out.data_ptr(),
      .B = q.size(0),
      .T = q.size(1),
      .S = k.size(1),
      .H = q.size(2),
      .D = q.size(3),
      .stride_q = {q_d.stride(0), q_d.stride(1), q_d.stride(2)},
      .stride_k = {k_d.stride(0), k_d.stride(1), k_d.stride(2)},
      .stride_v = {v_d.stride(0), v_d.stride(1), v_d.stride(2)},
      .window = window,
      .scale = float(scale ? *scale : 1 / std::sqrt(double(q.size(3)))),
      .dtype = dtype_of(q),
  };
  launch(&cpu::Table::decode_attention, args);
  return out;
}

TORCH_LIBRARY_IMPL(gpt2fast, CPU, m) { bind<decode_attention>(m, "decode_attention", uncovered_head); }

}  // namespace
}  // namespace gpt2fast
