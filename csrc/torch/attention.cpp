// attention for CPU tensors: allocates out and lse, fills AttentionArgs, and launches the kernel.
#include "binding.h"

namespace gpt2fast {
namespace {

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                                     const OptionalTensor& bias, const OptionalTensor& seed, bool causal,
                                     int64_t window, std::optional<double> scale, double dropout_p) {
  Tensor q_d = dense_inside(q), k_d = dense_inside(k), v_d = dense_inside(v);
  OptionalTensor mask_d = dense_inside(mask), seed_c = contiguous(seed);
  int64_t B = q.size(0), T = q.size(1), H = q.size(2), D = q.size(3);
  Tensor out = empty_output({B, T, H, D}, q.scalar_type()), lse = empty_output({B, H, T}, at::kFloat);
  // A dimension of size 1 is broadcast, so its stride counts as 0.
  auto stride_bias = [&](int64_t d) { return bias && bias->size(d) != 1 ? bias->stride(d) : 0; };
  AttentionArgs args{
      .q = q_d.const_data_ptr(),
      .k = k_d.const_data_ptr(),
      .v = v_d.const_data_ptr(),
      .mask = data<bool>(mask_d),
      .bias = data(bias),
      .out = out.data_ptr(),
      .lse = lse.data_ptr<float>(),
      .B = B,
      .T = T,
      .S = k.size(1),
      .H = H,
      .D = D,
      .stride_q = {q_d.stride(0), q_d.stride(1), q_d.stride(2)},
      .stride_k = {k_d.stride(0), k_d.stride(1), k_d.stride(2)},
      .stride_v = {v_d.stride(0), v_d.stride(1), v_d.stride(2)},
      .stride_mask_b = mask ? mask_d->stride(0) : 0,
      .stride_bias = {stride_bias(0), stride_bias(1), stride_bias(2), stride_bias(3)},
      .window = window,
      .causal = causal,
      .scale = float(scale ? *scale : 1 / std::sqrt(double(D))),
      .dropout_p = float(dropout_p),
      .seed = data<int64_t>(seed_c),
      .dtype = dtype_of(q),
  };
  launch(&cpu::Table::attention, args);
  return {out, lse};
}

TORCH_LIBRARY_IMPL(gpt2fast, CPU, m) { bind<attention>(m, "attention", uncovered_head); }

}  // namespace
}  // namespace gpt2fast
