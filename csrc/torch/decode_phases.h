// The kernel calls of a decoding step, one function for each kind of layer. They hold what their arguments point to.
#pragma once
#include <torch/extension.h>

#include "binding.h"
#include "team.h"

namespace gpt2fast {
namespace {

// Copies the new keys and values, which are columns [C, 3 C) of qkv (B, 3 C), into one column of the cache.
struct Append final : Phase {
  const char* qkv = nullptr;
  char *keys = nullptr, *values = nullptr;           // (B, S, H, D)
  int64_t B = 0, H = 0, column = 0, bytes = 0;       // bytes of a head
  int64_t stride_b = 0, stride_s = 0, stride_h = 0;  // of keys and values, in bytes

  int64_t tasks() const override { return B; }
  void run(int64_t begin, int64_t end) const override {
    for (int64_t b = begin; b < end; ++b)
      for (int64_t h = 0; h < H; ++h) {
        const char* from = qkv + ((b * 3 + 1) * H + h) * bytes;
        int64_t place = b * stride_b + column * stride_s + h * stride_h;
        std::memcpy(keys + place, from, size_t(bytes));
        std::memcpy(values + place, from + H * bytes, size_t(bytes));
      }
  }
};

Tensor checked(const Tensor& t, at::IntArrayRef sizes, ScalarType dtype, const char* name) {
  TORCH_CHECK_VALUE(t.sizes() == sizes, "gpt2fast::DecodeStep: ", name, " must have shape ", sizes, ", got ",
                    t.sizes());
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, "gpt2fast::DecodeStep: ", name, " must have dtype ", dtype, ", got ",
                   t.scalar_type());
  TORCH_CHECK_VALUE(t.is_cpu() && t.is_contiguous(), "gpt2fast::DecodeStep: ", name,
                    " must be a contiguous tensor on the CPU");
  return t;
}

// The parameters of a layer, in the order in which Python gives them. A linear layer has weight, bias and scale.
enum Parameter {
  kNorm1,
  kNorm1Bias,
  kAttn,
  kAttnOut = kAttn + 3,
  kNorm2 = kAttnOut + 3,
  kNorm2Bias,
  kFc,
  kFcOut = kFc + 3,
  kParameters = kFcOut + 3
};

// The weight of a linear layer or a table: of floats, or packed (csrc/cpu/packed_linear.h), where 8 bits have a scale.
struct Weight {
  Tensor weight;
  OptionalTensor bias, scale;

  bool packed() const { return weight.scalar_type() == at::kByte; }
};

Weight weight_at(const std::vector<OptionalTensor>& parameters, int place) {
  TORCH_CHECK_VALUE(parameters[place], "gpt2fast::DecodeStep: a weight must be a tensor, got None");
  return {*parameters[place], parameters[place + 1], parameters[place + 2]};
}

// The phases of a step for a batch of this size, and their memory.
class StepPhases {
 protected:
  StepPhases(int64_t batch, int64_t heads, int64_t vocabulary, double eps, const Tensor& wpe)
      : B_(batch), H_(heads), C_(wpe.size(1)), V_(vocabulary), P_(wpe.size(0)), dtype_(wpe.scalar_type()), eps_(eps) {}

  static void check_range(int64_t value, int64_t end, const char* name) {
    TORCH_CHECK_VALUE(value >= 0 && value < end, "gpt2fast::DecodeStep: ", name, " must lie in [0, ", end, "), got ",
                      value);
  }
  static void check_range(const Tensor& values, int64_t end, const char* name) {
    for (int64_t i = 0; i < values.numel(); ++i) check_range(values.const_data_ptr<int64_t>()[i], end, name);
  }

  void* hold(const Tensor& t) {
    held_.push_back(t);
    return t.data_ptr();
  }
  void* buffer(int64_t columns) { return hold(at::empty({B_, columns}, dtype_)); }

  template <class Args>
  KernelPhase<Args>* add(cpu::Kernel<Args> cpu::Table::* entry, const std::type_identity_t<Args>& args) {
    auto phase = std::make_unique<KernelPhase<Args>>(cpu::table().*entry, args);
    KernelPhase<Args>* added = phase.get();
    phases_.push_back(std::move(phase));
    return added;
  }

  void add_norm(const void* x, const Tensor& weight, const Tensor& bias, void* y) {
    add(&cpu::Table::layer_norm, LayerNormArgs{.x = x,
                                               .residual = nullptr,
                                               .weight = hold(checked(weight, {C_}, dtype_, "a norm's weight")),
                                               .bias = hold(checked(bias, {C_}, dtype_, "a norm's bias")),
                                               .y = y,
                                               .sum = nullptr,
                                               .mean = statistics_,
                                               .rstd = statistics_ + B_,
                                               .R = B_,
                                               .C = C_,
                                               .stride_x_r = C_,
                                               .stride_residual_r = 0,
                                               .eps = float(eps_),
                                               .dtype = to_dtype(dtype_)});
  }

  // The number of outputs of a linear layer: its bias tells.
  static int64_t outputs_of(const Weight& w) { return w.bias ? w.bias->size(0) : 0; }

  void add_embedding(const Weight& wte, const Tensor& wpe, void* out) {
    if (wte.packed()) {
      PackedEmbeddingArgs args{};
      args.wte = packed_bytes(wte, C_, V_, 8), args.scale = scale_of(wte, V_);
      packed_embedding_ = add_lookup(&cpu::Table::int8_embedding, args, wpe, out);
    } else {
      EmbeddingArgs args{};
      args.wte = hold(checked(wte.weight, {V_, C_}, dtype_, "wte")), args.stride_wte = C_;
      embedding_ = add_lookup(&cpu::Table::embedding, args, wpe, out);
    }
  }

  // Adds an embedding of either kind, whose args have the table of tokens. Tokens and positions are set token by token.
  template <class Args>
  KernelPhase<Args>* add_lookup(cpu::Kernel<Args> cpu::Table::* entry, Args args, const Tensor& wpe, void* out) {
    args.wpe = hold(checked(wpe, {P_, C_}, dtype_, "wpe"));
    args.out = out;
    args.B = B_, args.T = 1, args.C = C_, args.V = V_, args.P = P_;
    args.positions_stride_b = 1, args.stride_wpe = C_;
    args.dtype = to_dtype(dtype_);
    return add(entry, args);
  }

  const uint8_t* packed_bytes(const Weight& w, int64_t K, int64_t N, int bits) {
    int64_t blocks = (N + kPackedOutputs - 1) / kPackedOutputs, groups = (K + kPackedInputs - 1) / kPackedInputs;
    return (const uint8_t*)hold(
        checked(w.weight, {blocks, groups, bits == 8 ? kInt8GroupBytes : kInt4GroupBytes}, at::kByte, "a weight"));
  }
  const float* scale_of(const Weight& w, int64_t N) {
    TORCH_CHECK_VALUE(w.scale, "gpt2fast::DecodeStep: a weight of 8 bits must have a scale, got None");
    return (const float*)hold(checked(*w.scale, {N}, at::kFloat, "a scale"));
  }

  // y (B, N) = activation(x (B, K) @ W + bias) + residual, where a weight of floats is (K, N) or, if transposed, (N,
  // K).
  void add_linear(const void* x, int64_t K, const Weight& w, const void* residual, Activation activation, void* y,
                  int64_t N, bool transposed = false) {
    const void* bias = w.bias ? hold(checked(*w.bias, {N}, dtype_, "a bias")) : nullptr;
    if (w.packed()) {
      bool int8 = w.scale.has_value();
      TORCH_CHECK_VALUE(int8 || bias, "gpt2fast::DecodeStep: a weight of 4 bits must have a bias, got None");
      add(int8 ? &cpu::Table::int8_linear : &cpu::Table::int4_linear,
          PackedLinearArgs{.x = x,
                           .bias = bias,
                           .residual = residual,
                           .weight = packed_bytes(w, K, N, int8 ? 8 : 4),
                           .scale = int8 ? scale_of(w, N) : nullptr,
                           .y = y,
                           .M = B_,
                           .K = K,
                           .N = N,
                           .stride_x_m = K,
                           .stride_residual_m = N,
                           .activation = activation,
                           .dtype = to_dtype(dtype_)});
      return;
    }
    std::vector<int64_t> sizes = transposed ? std::vector<int64_t>{N, K} : std::vector<int64_t>{K, N};
    add(&cpu::Table::linear, LinearArgs{.x = x,
                                        .weight = hold(checked(w.weight, sizes, dtype_, "a weight")),
                                        .bias = bias,
                                        .residual = residual,
                                        .y = y,
                                        .preactivation = nullptr,
                                        .M = B_,
                                        .K = K,
                                        .N = N,
                                        .stride_x_m = K,
                                        .stride_weight = w.weight.stride(0),
                                        .stride_residual_m = N,
                                        .transposed = transposed,
                                        .activation = activation,
                                        .dtype = to_dtype(dtype_)});
  }

  void add_attention(const void* qkv, float scale, void* out) {
    int64_t D = C_ / H_, size = int64_t(c10::elementSize(dtype_));
    auto append = std::make_unique<Append>();
    append->qkv = (const char*)qkv, append->B = B_, append->H = H_, append->bytes = D * size;
    appends_.push_back(append.get());
    phases_.push_back(std::move(append));
    attentions_.push_back(add(&cpu::Table::decode_attention, DecodeAttentionArgs{.q = qkv,
                                                                                 .k = nullptr,
                                                                                 .v = nullptr,
                                                                                 .lengths = nullptr,
                                                                                 .starts = nullptr,
                                                                                 .out = out,
                                                                                 .B = B_,
                                                                                 .T = 1,
                                                                                 .S = 0,
                                                                                 .H = H_,
                                                                                 .D = D,
                                                                                 .stride_q = {3 * C_, 3 * C_, D},
                                                                                 .stride_k = {},
                                                                                 .stride_v = {},
                                                                                 .window = 0,
                                                                                 .scale = scale,
                                                                                 .dtype = to_dtype(dtype_)}));
  }

  int64_t B_, H_, C_, V_, P_;
  ScalarType dtype_;
  double eps_;
  float* statistics_ = nullptr;  // (2, B): mean and rstd, which nobody reads
  Tensor logits_;
  std::vector<Tensor> held_, cache_;  // what the phases point to
  Phases phases_;
  KernelPhase<EmbeddingArgs>* embedding_ = nullptr;  // one of the two
  KernelPhase<PackedEmbeddingArgs>* packed_embedding_ = nullptr;
  std::vector<Append*> appends_;  // of each layer
  std::vector<KernelPhase<DecodeAttentionArgs>*> attentions_;
};

}  // namespace
}  // namespace gpt2fast
