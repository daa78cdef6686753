// One decoding step of GPT-2 on a CPU: a new token for each row of a batch goes through embedding, layers and head in
// one parallel region (team.h). The kernels and their arguments are those of the ops, and
// so are the bits of the result.
#include "decode_step.h"

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

// The parameters of a layer, in the order in which Python gives them.
enum Parameter {
  kNorm1,
  kNorm1Bias,
  kAttn,
  kAttnBias,
  kAttnOut,
  kAttnOutBias,
  kNorm2,
  kNorm2Bias,
  kFc,
  kFcBias,
  kFcOut,
  kFcOutBias,
  kParameters
};

// The kernel calls of a step are made once, for one batch size and the parameters that the model has then. A call of
// logits() only changes what differs from token to token: tokens, positions, lengths and the column of the cache.
class DecodeStep {
 public:
  DecodeStep(int64_t batch, int64_t heads, double eps, const std::string& activation,
             const std::vector<std::vector<Tensor>>& layers, const std::vector<double>& scales, const Tensor& wte,
             const Tensor& wpe, const Tensor& norm, const Tensor& norm_bias, const Tensor& head)
      : B_(batch), H_(heads), C_(wte.size(1)), V_(wte.size(0)), P_(wpe.size(0)), dtype_(wte.scalar_type()), eps_(eps) {
    TORCH_CHECK_VALUE(B_ > 0 && H_ > 0 && C_ % H_ == 0, "gpt2fast::DecodeStep: heads must divide ", C_,
                      " and batch must be positive, got ", H_, " and ", B_);
    TORCH_CHECK_VALUE(!uncovered_dtype(wte), "gpt2fast::DecodeStep: ", uncovered_dtype(wte));
    TORCH_CHECK_VALUE(layers.size() == scales.size(), "gpt2fast::DecodeStep: scales must be ", layers.size(), ", got ",
                      scales.size());
    void *x = buffer(C_), *y = buffer(C_), *qkv = buffer(3 * C_), *z = buffer(C_);
    int64_t inner = layers.empty() ? 0 : layers[0].at(kFc).size(1);
    void* wide = buffer(inner);
    statistics_ = (float*)hold(at::empty({2, B_}, at::kFloat));
    logits_ = at::empty({B_, V_}, dtype_);
    embedding_ = add(&cpu::Table::embedding, EmbeddingArgs{.tokens = nullptr,
                                                           .positions = nullptr,
                                                           .token_types = nullptr,
                                                           .wte = hold(checked(wte, {V_, C_}, dtype_, "wte")),
                                                           .wpe = hold(checked(wpe, {P_, C_}, dtype_, "wpe")),
                                                           .out = x,
                                                           .B = B_,
                                                           .T = 1,
                                                           .C = C_,
                                                           .V = V_,
                                                           .P = P_,
                                                           .start = 0,
                                                           .positions_stride_b = 1,
                                                           .stride_wte = C_,
                                                           .stride_wpe = C_,
                                                           .dtype = to_dtype(dtype_)});
    TORCH_CHECK_VALUE(activation == "gelu_tanh" || activation == "gelu_erf",
                      "gpt2fast::DecodeStep: activation must be gelu_tanh or gelu_erf, got ", activation);
    Activation fused = activation_of(activation);
    for (size_t i = 0; i < layers.size(); ++i) {
      const auto& p = layers[i];
      TORCH_CHECK_VALUE(p.size() == kParameters, "gpt2fast::DecodeStep: a layer must have ", int(kParameters),
                        " parameters, got ", p.size());
      add_norm(x, p[kNorm1], p[kNorm1Bias], y);
      add_linear(y, C_, p[kAttn], p[kAttnBias], nullptr, Activation::kNone, qkv, 3 * C_);
      add_attention(qkv, float(scales[i]), y);
      add_linear(y, C_, p[kAttnOut], p[kAttnOutBias], x, Activation::kNone, z, C_);
      add_norm(z, p[kNorm2], p[kNorm2Bias], y);
      add_linear(y, C_, p[kFc], p[kFcBias], nullptr, fused, wide, inner);
      add_linear(wide, inner, p[kFcOut], p[kFcOutBias], z, Activation::kNone, x, C_);
    }
    add_norm(x, norm, norm_bias, y);
    add_linear(y, C_, head, {}, nullptr, Activation::kNone, logits_.data_ptr(), V_, true);
  }

  // Sets the cache: for each layer keys and values (B, S, H, D), whose heads are dense.
  void set_cache(const std::vector<Tensor>& keys, const std::vector<Tensor>& values) {
    TORCH_CHECK_VALUE(keys.size() == appends_.size() && values.size() == appends_.size(),
                      "gpt2fast::DecodeStep: a cache must have ", appends_.size(), " layers, got ", keys.size());
    cache_ = keys;
    cache_.insert(cache_.end(), values.begin(), values.end());
    for (size_t i = 0; i < keys.size(); ++i) {
      const Tensor &k = keys[i], &v = values[i];
      bool fits = k.dim() == 4 && k.size(0) == B_ && k.size(2) == H_ && k.size(3) == C_ / H_ && k.stride(3) == 1;
      fits = fits && k.is_cpu() && k.scalar_type() == dtype_ && v.scalar_type() == dtype_ && v.is_cpu();
      TORCH_CHECK_VALUE(fits && k.sizes() == v.sizes() && k.strides() == v.strides(),
                        "gpt2fast::DecodeStep: keys and values must be (", B_, ", S, ", H_, ", ", C_ / H_, ") ", dtype_,
                        " on the CPU, got ", k.sizes(), " ", k.scalar_type());
      int64_t size = k.element_size();
      Append& append = *appends_[i];
      append.keys = (char*)k.data_ptr(), append.values = (char*)v.data_ptr();
      append.stride_b = k.stride(0) * size, append.stride_s = k.stride(1) * size, append.stride_h = k.stride(2) * size;
      DecodeAttentionArgs& a = attentions_[i]->args;
      a.k = k.data_ptr(), a.v = v.data_ptr(), a.S = k.size(1);
      for (int d = 0; d < 3; ++d) a.stride_k[d] = a.stride_v[d] = k.stride(d);
    }
  }

  // The logits (B, V) of the tokens (B, 1), whose keys and values go to `column` of the cache. positions (B, 1) or, for
  // none, `column`; lengths (B), the new column included; starts (B) or none.
  Tensor logits(const Tensor& tokens, const OptionalTensor& positions, const Tensor& lengths,
                const OptionalTensor& starts, int64_t column) {
    checked(tokens, {B_, 1}, at::kLong, "tokens");
    checked(lengths, {B_}, at::kLong, "lengths");
    if (positions) checked(*positions, {B_, 1}, at::kLong, "positions");
    if (starts) checked(*starts, {B_}, at::kLong, "starts");
    int64_t room = attentions_.empty() ? P_ : attentions_[0]->args.S;
    TORCH_CHECK_VALUE(column >= 0 && column < room, "gpt2fast::DecodeStep: column must lie in [0, ", room, "), got ",
                      column);
    check_range(tokens, V_, "tokens");
    positions ? check_range(*positions, P_, "positions") : check_range(column, P_, "positions");
    EmbeddingArgs& e = embedding_->args;
    e.tokens = tokens.const_data_ptr<int64_t>();
    e.positions = data<int64_t>(positions);
    e.start = column;
    for (Append* append : appends_) append->column = column;
    for (auto* attention : attentions_) {
      attention->args.lengths = lengths.const_data_ptr<int64_t>();
      attention->args.starts = data<int64_t>(starts);
    }
    {
      pybind11::gil_scoped_release release;
      run_phases(phases_);
    }
    return logits_;
  }

 private:
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

  // y (B, N) = activation(x (B, K) @ W + bias) + residual, where weight is (K, N) or, if transposed, (N, K).
  void add_linear(const void* x, int64_t K, const Tensor& weight, const OptionalTensor& bias, const void* residual,
                  Activation activation, void* y, int64_t N, bool transposed = false) {
    std::vector<int64_t> sizes = transposed ? std::vector<int64_t>{N, K} : std::vector<int64_t>{K, N};
    add(&cpu::Table::linear, LinearArgs{.x = x,
                                        .weight = hold(checked(weight, sizes, dtype_, "a weight")),
                                        .bias = bias ? hold(checked(*bias, {N}, dtype_, "a bias")) : nullptr,
                                        .residual = residual,
                                        .y = y,
                                        .preactivation = nullptr,
                                        .M = B_,
                                        .K = K,
                                        .N = N,
                                        .stride_x_m = K,
                                        .stride_weight = weight.stride(0),
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
  KernelPhase<EmbeddingArgs>* embedding_ = nullptr;
  std::vector<Append*> appends_;  // of each layer
  std::vector<KernelPhase<DecodeAttentionArgs>*> attentions_;
};

}  // namespace

void bind_decode_step(pybind11::module_& m) {
  pybind11::class_<DecodeStep>(m, "DecodeStep", "A decoding step of GPT-2 for a batch of this size: gpt2fast/step.py")
      .def(pybind11::init<int64_t, int64_t, double, const std::string&, const std::vector<std::vector<Tensor>>&,
                          const std::vector<double>&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                          const Tensor&>())
      .def("set_cache", &DecodeStep::set_cache)
      .def("logits", &DecodeStep::logits);
}

}  // namespace gpt2fast
