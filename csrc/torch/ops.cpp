// Tensors to args to kernel: the CPU implementations of the ops, below autograd and autocast.
#include <torch/library.h>

#include "launch.h"
#include "memory.h"

namespace gpt2fast {
namespace {

Activation parse_gelu(const char* op, std::string_view approximate) {
  TORCH_CHECK_VALUE(approximate == "tanh" || approximate == "none", "gpt2fast::", op,
                    ": approximate must be 'tanh' or 'none', got '", approximate, "'");
  return approximate == "tanh" ? Activation::kGeluTanh : Activation::kGeluErf;
}

Activation parse_activation(std::string_view activation) {
  if (activation == "none") return Activation::kNone;
  if (activation == "gelu_tanh") return Activation::kGeluTanh;
  if (activation == "gelu_erf") return Activation::kGeluErf;
  TORCH_CHECK_VALUE(false, "gpt2fast::linear: activation must be 'none', 'gelu_tanh' or 'gelu_erf', got '", activation,
                    "'");
}

// sizes of x with the last one replaced
std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = last;
  return sizes;
}

Tensor embedding(const Tensor& tokens, const Tensor& wte, const Tensor& wpe, const OptionalTensor& positions,
                 const OptionalTensor& token_types, int64_t start) {
  Check check("embedding");
  check("tokens", tokens, "B T", at::kLong)("wte", wte, "V C")("wpe", wpe, "P C");
  check("positions", positions, "B|1 T", at::kLong)("token_types", token_types, "B T", at::kLong);
  if (uncovered_dtype(wte.scalar_type()))
    return fall_back<Tensor>("embedding", tokens, wte, wpe, positions, token_types, start);
  int64_t B = check['B'], T = check['T'], P = check['P'];
  TORCH_CHECK_VALUE(positions || (start >= 0 && start + T <= P), check.prefix("positions"), "must lie in [0, ", P,
                    "), got start = ", start, " and T = ", T);
  check.within("tokens", tokens, check['V']);
  check.within("positions", positions, P);
  check.within("token_types", token_types, check['V']);
  auto tokens_c = tokens.expect_contiguous(), wte_c = wte.expect_contiguous(), wpe_c = wpe.expect_contiguous();
  OptionalTensor positions_c = contiguous(positions), types_c = contiguous(token_types);
  Tensor out = empty_output({B, T, check['C']}, wte.scalar_type());
  launch(cpu::table().embedding,
         {tokens_c->const_data_ptr<int64_t>(), (const int64_t*)data(positions_c), (const int64_t*)data(types_c),
          wte_c->const_data_ptr(), wpe_c->const_data_ptr(), out.data_ptr(), B, T, check['C'], check['V'], P, start,
          positions && positions->size(0) != 1 ? T : 0, to_dtype(wte.scalar_type())});
  return out;
}

struct Normalised {
  Tensor y, sum, mean, rstd;
};

Normalised normalise(const Tensor& x, const OptionalTensor& residual, const Tensor& weight, const Tensor& bias,
                     double eps) {
  Rows rows(x);
  std::optional<Rows> rows_residual;
  if (residual) rows_residual.emplace(*residual);
  auto weight_c = weight.expect_contiguous(), bias_c = bias.expect_contiguous();
  Normalised out;
  out.y = empty_output(x.sizes(), x.scalar_type());
  if (residual) out.sum = empty_output(x.sizes(), x.scalar_type());
  auto leading = x.sizes().slice(0, x.dim() - 1);
  out.mean = empty_output(leading, at::kFloat);
  out.rstd = empty_output(leading, at::kFloat);
  launch(cpu::table().layer_norm,
         {rows.data, residual ? rows_residual->data : nullptr, weight_c->const_data_ptr(), bias_c->const_data_ptr(),
          out.y.data_ptr(), residual ? out.sum.data_ptr() : nullptr, out.mean.data_ptr<float>(),
          out.rstd.data_ptr<float>(), rows.count, x.size(-1), rows.stride, residual ? rows_residual->stride : 0,
          float(eps), to_dtype(x.scalar_type())});
  return out;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps) {
  Check check("layer_norm");
  check("x", x, "... C")("weight", weight, "C")("bias", bias, "C");
  if (uncovered_dtype(x.scalar_type()))
    return fall_back<std::tuple<Tensor, Tensor, Tensor>>("layer_norm", x, weight, bias, eps);
  Normalised out = normalise(x, {}, weight, bias, eps);
  return {out.y, out.mean, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                          const Tensor& bias, double eps) {
  Check check("add_layer_norm");
  check("x", x, "... C")("residual", residual, "... C")("weight", weight, "C")("bias", bias, "C");
  if (uncovered_dtype(x.scalar_type()))
    return fall_back<std::tuple<Tensor, Tensor, Tensor, Tensor>>("add_layer_norm", x, residual, weight, bias, eps);
  Normalised out = normalise(x, residual, weight, bias, eps);
  return {out.y, out.sum, out.mean, out.rstd};
}

std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                  const OptionalTensor& residual, std::string_view activation, bool transposed,
                                  bool keep_preactivation) {
  Check check("linear");
  check("x", x, "... K")("weight", weight, transposed ? "N K" : "K N")("bias", bias, "N")("residual", residual,
                                                                                          "... N");
  Activation act = parse_activation(activation);
  if (uncovered_linear(x))
    return fall_back<std::tuple<Tensor, Tensor>>("linear", x, weight, bias, residual, std::string(activation),
                                                 transposed, keep_preactivation);
  bool flipped = weight.stride(0) == 1 && weight.stride(1) >= weight.size(0) && weight.stride(1) != 1;
  Tensor held = flipped ? weight.t() : weight.stride(1) == 1 ? weight : weight.contiguous();
  Rows rows(x);
  std::optional<Rows> rows_residual;
  if (residual) rows_residual.emplace(*residual);
  OptionalTensor bias_c = contiguous(bias);
  Tensor y = empty_output(with_last(x, check['N']), x.scalar_type());
  bool keeps = keep_preactivation && act != Activation::kNone;
  Tensor kept = keeps ? empty_output(y.sizes(), x.scalar_type()) : empty_output({0}, x.scalar_type());
  launch(cpu::table().linear,
         {rows.data, held.const_data_ptr(), data(bias_c), residual ? rows_residual->data : nullptr, y.data_ptr(),
          kept.numel() ? kept.data_ptr() : nullptr, rows.count, check['K'], check['N'], rows.stride, held.stride(0),
          residual ? rows_residual->stride : 0, transposed != flipped, act, to_dtype(x.scalar_type())});
  return {y, kept};
}

Tensor run_gelu(const Tensor& x, const OptionalTensor& bias, Activation activation) {
  Rows rows(x);
  OptionalTensor bias_c = contiguous(bias);
  Tensor y = empty_output(x.sizes(), x.scalar_type());
  launch(cpu::table().gelu, {rows.data, data(bias_c), y.data_ptr(), rows.count, x.size(-1), rows.stride, activation,
                             to_dtype(x.scalar_type())});
  return y;
}

Tensor gelu(const Tensor& x, std::string_view approximate) {
  Check check("gelu");
  check("x", x, "... C");
  Activation activation = parse_gelu("gelu", approximate);
  if (uncovered_dtype(x.scalar_type())) return fall_back<Tensor>("gelu", x, std::string(approximate));
  return run_gelu(x, {}, activation);
}

Tensor bias_gelu(const Tensor& x, const Tensor& bias, std::string_view approximate) {
  Check check("bias_gelu");
  check("x", x, "... C")("bias", bias, "C");
  Activation activation = parse_gelu("bias_gelu", approximate);
  if (uncovered_dtype(x.scalar_type())) return fall_back<Tensor>("bias_gelu", x, bias, std::string(approximate));
  return run_gelu(x, bias, activation);
}

Tensor dense_inside(const Tensor& t) { return t.stride(-1) == 1 || t.size(-1) <= 1 ? t : t.contiguous(); }

void set_strides(int64_t (&out)[3], const Tensor& t) {
  for (int i = 0; i < 3; ++i) out[i] = t.stride(i);
}

void check_window(const Check& check, int64_t window) {
  TORCH_CHECK_VALUE(window >= 0, check.prefix("window"), "must be at least 0 (0: unlimited), got ", window);
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                                     const OptionalTensor& bias, const OptionalTensor& seed, bool causal,
                                     int64_t window, std::optional<double> scale, double dropout_p) {
  Check check("attention");
  check("q", q, "B T H D")("k", k, "B S H D")("v", v, "B S H D")("mask", mask, "B S", at::kBool);
  check("bias", bias, "B|1 H|1 T|1 S|1")("seed", seed, "1", at::kLong);
  check_window(check, window);
  TORCH_CHECK_VALUE(dropout_p >= 0 && dropout_p < 1, check.prefix("dropout_p"), "must lie in [0, 1), got ", dropout_p);
  TORCH_CHECK_VALUE(dropout_p == 0 || seed, check.prefix("seed"), "must be given where dropout_p > 0, got None");
  int64_t B = check['B'], T = check['T'], S = check['S'], H = check['H'], D = check['D'];
  if (uncovered_attention(q.scalar_type(), D))
    return fall_back<std::tuple<Tensor, Tensor>>("attention", q, k, v, mask, bias, seed, causal, window, scale,
                                                 dropout_p);
  Tensor q_d = dense_inside(q), k_d = dense_inside(k), v_d = dense_inside(v);
  OptionalTensor mask_d = mask ? OptionalTensor(dense_inside(*mask)) : mask, seed_c = contiguous(seed);
  Tensor out = empty_output({B, T, H, D}, q.scalar_type()), lse = empty_output({B, H, T}, at::kFloat);
  AttentionArgs args{};
  args.q = q_d.const_data_ptr(), args.k = k_d.const_data_ptr(), args.v = v_d.const_data_ptr();
  args.mask = (const bool*)data(mask_d), args.bias = data(bias);
  args.out = out.data_ptr(), args.lse = lse.data_ptr<float>();
  args.B = B, args.T = T, args.S = S, args.H = H, args.D = D;
  set_strides(args.stride_q, q_d), set_strides(args.stride_k, k_d), set_strides(args.stride_v, v_d);
  if (mask_d) args.stride_mask_b = mask_d->stride(0);
  if (bias)
    for (int i = 0; i < 4; ++i) args.stride_bias[i] = bias->size(i) == 1 ? 0 : bias->stride(i);
  args.window = window, args.causal = causal, args.scale = float(scale ? *scale : 1 / std::sqrt(double(D)));
  args.dropout_p = float(dropout_p), args.seed = (const int64_t*)data(seed_c);
  args.dtype = to_dtype(q.scalar_type());
  launch(cpu::table().attention, args);
  return {out, lse};
}

Tensor decode_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lengths,
                        const OptionalTensor& starts, int64_t window, std::optional<double> scale) {
  Check check("decode_attention");
  check("q", q, "B T H D")("k", k, "B S H D")("v", v, "B S H D")("lengths", lengths, "B", at::kLong);
  check("starts", starts, "B", at::kLong);
  check_window(check, window);
  int64_t D = check['D'];
  if (uncovered_attention(q.scalar_type(), D))
    return fall_back<Tensor>("decode_attention", q, k, v, lengths, starts, window, scale);
  check.within("lengths", lengths, check['S'] + 1);
  check.within("starts", starts, check['S'] + 1);
  Tensor q_d = dense_inside(q), k_d = dense_inside(k), v_d = dense_inside(v), lengths_c = lengths.contiguous();
  OptionalTensor starts_c = contiguous(starts);
  Tensor out = empty_output({check['B'], check['T'], check['H'], D}, q.scalar_type());
  DecodeAttentionArgs args{};
  args.q = q_d.const_data_ptr(), args.k = k_d.const_data_ptr(), args.v = v_d.const_data_ptr();
  args.lengths = lengths_c.const_data_ptr<int64_t>(), args.starts = (const int64_t*)data(starts_c);
  args.out = out.data_ptr();
  args.B = check['B'], args.T = check['T'], args.S = check['S'], args.H = check['H'], args.D = D;
  set_strides(args.stride_q, q_d), set_strides(args.stride_k, k_d), set_strides(args.stride_v, v_d);
  args.window = window, args.scale = float(scale ? *scale : 1 / std::sqrt(double(D)));
  args.dtype = to_dtype(q.scalar_type());
  launch(cpu::table().decode_attention, args);
  return out;
}

std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& targets, int64_t ignore_index,
                                         double label_smoothing, std::string_view reduction) {
  Check check("cross_entropy");
  check("logits", logits, "R V")("targets", targets, "R", at::kLong);
  TORCH_CHECK_VALUE(reduction == "none" || reduction == "mean" || reduction == "sum",
                    "gpt2fast::cross_entropy: reduction must be 'none', 'mean' or 'sum', got '", reduction, "'");
  TORCH_CHECK_VALUE(label_smoothing >= 0 && label_smoothing <= 1, check.prefix("label_smoothing"),
                    "must lie in [0, 1], got ", label_smoothing);
  if (uncovered_dtype(logits.scalar_type()))
    return fall_back<std::tuple<Tensor, Tensor>>("cross_entropy", logits, targets, ignore_index, label_smoothing,
                                                 std::string(reduction));
  check.within("targets", targets, check['V'], ignore_index);
  int64_t R = check['R'];
  Rows rows(logits);
  Tensor targets_c = targets.contiguous();
  Tensor loss = empty_output({R}, at::kFloat), lse = empty_output({R}, at::kFloat);
  const int64_t* target = targets_c.const_data_ptr<int64_t>();
  float* losses = loss.data_ptr<float>();
  launch(cpu::table().cross_entropy, {rows.data, target, losses, lse.data_ptr<float>(), R, check['V'], rows.stride,
                                      ignore_index, float(label_smoothing), to_dtype(logits.scalar_type())});
  if (reduction == "none") return {loss, lse};
  double total = 0;
  int64_t count = 0;
  for (int64_t r = 0; r < R; ++r) total += losses[r], count += target[r] != ignore_index;
  return {at::full({}, reduction == "mean" ? total / double(count) : total, loss.options()), lse};
}

template <class T>
bool any_nan(const T* x, int64_t n) {
  uint32_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    float value = to_float(x[i]);
    found |= uint32_t(value != value);
  }
  return found;
}

Tensor sample(const Tensor& logits, const Tensor& seed, const Tensor& positions, const OptionalTensor& tokens,
              const OptionalTensor& rows, double temperature, int64_t top_k, double top_p, double min_p,
              double repetition_penalty) {
  Check check("sample");
  check("logits", logits, "B V")("seed", seed, "1", at::kLong)("positions", positions, "B", at::kLong);
  check("tokens", tokens, "B T", at::kLong)("rows", rows, "B", at::kLong);
  auto need = [&](bool fine, const char* name, const char* expected, double got) {
    TORCH_CHECK_VALUE(fine, check.prefix(name), "must ", expected, ", got ", got);
  };
  need(temperature >= 0, "temperature", "be at least 0 (0: the likeliest token)", temperature);
  need(top_k >= 0, "top_k", "be at least 0 (0: off)", double(top_k));
  need(top_p > 0 && top_p <= 1, "top_p", "lie in (0, 1]", top_p);
  need(min_p >= 0 && min_p <= 1, "min_p", "lie in [0, 1]", min_p);
  need(repetition_penalty > 0, "repetition_penalty", "be above 0", repetition_penalty);
  if (uncovered_dtype(logits.scalar_type()))
    return fall_back<Tensor>("sample", logits, seed, positions, tokens, rows, temperature, top_k, top_p, min_p,
                             repetition_penalty);
  int64_t B = check['B'], V = check['V'];
  TORCH_CHECK_VALUE(V > 0, check.prefix("logits"), "must have V of at least 1, got 0");
  Tensor logits_d = dense_inside(logits), seed_c = seed.contiguous(), positions_c = positions.contiguous();
  OptionalTensor tokens_d = tokens ? OptionalTensor(dense_inside(*tokens)) : tokens, rows_c = contiguous(rows);
  if (tokens) check.within("tokens", *tokens, V, -1);
  with_dtype(to_dtype(logits.scalar_type()), [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t b = 0; b < B; ++b)
      TORCH_CHECK_VALUE(!any_nan((const T*)logits_d.const_data_ptr() + b * logits_d.stride(0), V),
                        check.prefix("logits"), "must not hold NaN, got NaN in row ", b);
  });
  Tensor out = empty_output({B}, at::kLong);
  launch(cpu::table().sample,
         {logits_d.const_data_ptr(), (const int64_t*)data(tokens_d), seed_c.const_data_ptr<int64_t>(),
          positions_c.const_data_ptr<int64_t>(), (const int64_t*)data(rows_c), out.data_ptr<int64_t>(), B,
          tokens ? tokens->size(1) : 0, V, logits_d.stride(0), tokens ? tokens_d->stride(0) : 0, float(temperature),
          float(top_p), float(min_p), float(repetition_penalty), top_k, to_dtype(logits.scalar_type())});
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt2fast, CPU, m) {
  m.impl("embedding", embedding);
  m.impl("layer_norm", layer_norm);
  m.impl("add_layer_norm", add_layer_norm);
  m.impl("linear", linear);
  m.impl("gelu", gelu);
  m.impl("bias_gelu", bias_gelu);
  m.impl("attention", attention);
  m.impl("decode_attention", decode_attention);
  m.impl("cross_entropy", cross_entropy);
  m.impl("sample", sample);
}

}  // namespace gpt2fast
