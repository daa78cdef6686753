// Decoding with GPT-2 on a CPU: a new token for each row of a batch goes through embedding, layers and head in one
// parallel region (team.h), and the next token is drawn there, too. The kernels and their arguments are those of the
// ops, and so are the bits of the result.
#include "decode_step.h"

#include <algorithm>

#include "decode_phases.h"

namespace gpt2fast {
namespace {

// The kernel calls of a step are made once, for one batch size and the parameters that the model has then. A step only
// changes what differs from token to token: tokens, positions, lengths and the column of the cache.
class DecodeStep : StepPhases {
 public:
  using Parameters = std::vector<OptionalTensor>;

  DecodeStep(int64_t batch, int64_t heads, int64_t vocabulary, double eps, const std::string& activation,
             const std::vector<Parameters>& layers, const std::vector<double>& scales, const Parameters& wte,
             const Tensor& wpe, const Tensor& norm, const Tensor& norm_bias, const Parameters& head)
      : StepPhases(batch, heads, vocabulary, eps, wpe) {
    TORCH_CHECK_VALUE(B_ > 0 && H_ > 0 && C_ % H_ == 0, "gpt2fast::DecodeStep: heads must divide ", C_,
                      " and batch must be positive, got ", H_, " and ", B_);
    TORCH_CHECK_VALUE(!uncovered_dtype(wpe), "gpt2fast::DecodeStep: ", uncovered_dtype(wpe));
    TORCH_CHECK_VALUE(layers.size() == scales.size(), "gpt2fast::DecodeStep: scales must be ", layers.size(), ", got ",
                      scales.size());
    TORCH_CHECK_VALUE(wte.size() == 3 && head.size() == 3, "gpt2fast::DecodeStep: a table must have 3 parameters");
    void *x = buffer(C_), *y = buffer(C_), *qkv = buffer(3 * C_), *z = buffer(C_);
    int64_t inner = layers.empty() ? 0 : outputs_of(weight_at(layers[0], kFc));
    void* wide = buffer(inner);
    statistics_ = (float*)hold(at::empty({2, B_}, at::kFloat));
    logits_ = at::empty({B_, V_}, dtype_);
    add_embedding(weight_at(wte, 0), wpe, x);
    TORCH_CHECK_VALUE(activation == "gelu_tanh" || activation == "gelu_erf",
                      "gpt2fast::DecodeStep: activation must be gelu_tanh or gelu_erf, got ", activation);
    Activation fused = activation_of(activation);
    for (size_t i = 0; i < layers.size(); ++i) {
      const auto& p = layers[i];
      TORCH_CHECK_VALUE(p.size() == kParameters, "gpt2fast::DecodeStep: a layer must have ", int(kParameters),
                        " parameters, got ", p.size());
      add_norm(x, p[kNorm1].value(), p[kNorm1Bias].value(), y);
      add_linear(y, C_, weight_at(p, kAttn), nullptr, Activation::kNone, qkv, 3 * C_);
      add_attention(qkv, float(scales[i]), y);
      add_linear(y, C_, weight_at(p, kAttnOut), x, Activation::kNone, z, C_);
      add_norm(z, p[kNorm2].value(), p[kNorm2Bias].value(), y);
      add_linear(y, C_, weight_at(p, kFc), nullptr, fused, wide, inner);
      add_linear(wide, inner, weight_at(p, kFcOut), z, Activation::kNone, x, C_);
    }
    add_norm(x, norm, norm_bias, y);
    add_linear(y, C_, weight_at(head, 0), nullptr, Activation::kNone, logits_.data_ptr(), V_, true);
    drawn_ = (int64_t*)hold(at::empty({B_}, at::kLong));
    SampleArgs draw{};  // set_draw and decode set the rest
    draw.logits = logits_.data_ptr(), draw.out = drawn_;
    draw.B = B_, draw.V = V_, draw.stride_logits_b = V_;
    draw.dtype = to_dtype(dtype_);
    sample_ = add(&cpu::Table::sample, draw);
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
    check_rows(tokens, positions, lengths, starts, column, 1);
    pybind11::gil_scoped_release release;
    run(tokens, positions, lengths, starts, column, phases_.size() - 1);
    return logits_;
  }

  // How decode() draws: seed (1), rows (B) or none, and the options of the op sample.
  void set_draw(const Tensor& seed, const OptionalTensor& rows, double temperature, int64_t top_k, double top_p,
                double min_p, double repetition_penalty) {
    checked(seed, {1}, at::kLong, "seed");
    if (rows) checked(*rows, {B_}, at::kLong, "rows");
    seed_ = seed, rows_ = rows;
    SampleArgs& a = sample_->args;
    a.seed = seed_.const_data_ptr<int64_t>(), a.rows = data<int64_t>(rows_);
    a.temperature = float(temperature), a.top_k = top_k, a.top_p = float(top_p), a.min_p = float(min_p);
    a.repetition_penalty = float(repetition_penalty);
  }

  // Runs up to N turns and returns how many it ran. In a turn, the model reads tokens (B, 1) as logits() does, the next
  // ones are drawn, and these are written to tokens and to a column of out (B, N). positions, lengths and real (B),
  // which counts a row's tokens without padding, are those of the tokens before `tokens`; each turn brings them up to
  // date. seen (B, S) or none has the tokens of the repetition penalty, column by column. A row for which alive (B) is
  // false gets the token pad. After a turn in which another row draws one of `ends`, no further one is run. After an
  // exception, the tensors are those of some turn, and must not be used.
  int64_t decode(const Tensor& tokens, const OptionalTensor& positions, const Tensor& lengths,
                 const OptionalTensor& starts, int64_t column, const Tensor& real, const OptionalTensor& seen,
                 const Tensor& out, const Tensor& alive, int64_t pad, const std::vector<int64_t>& ends) {
    TORCH_CHECK_VALUE(sample_->args.seed, "gpt2fast::DecodeStep: set_draw must be called before decode");
    TORCH_CHECK_VALUE(out.dim() == 2, "gpt2fast::DecodeStep: out must have shape (B, N), got ", out.sizes());
    int64_t turns = out.size(1), width = seen && seen->dim() == 2 ? seen->size(1) : 0;
    check_rows(tokens, positions, lengths, starts, column, turns);
    checked(out, {B_, turns}, at::kLong, "out");
    checked(real, {B_}, at::kLong, "real");
    checked(alive, {B_}, at::kBool, "alive");
    if (seen) checked(*seen, {B_, width}, at::kLong, "seen");
    TORCH_CHECK_VALUE(!seen || width > column + turns, "gpt2fast::DecodeStep: seen must have more than ",
                      column + turns, " columns, got ", width);
    int64_t* past = seen ? seen->data_ptr<int64_t>() : nullptr;
    for (int64_t b = 0; past && b < B_; ++b)
      for (int64_t t = 0; t <= column; ++t)
        if (past[b * width + t] != -1) check_range(past[b * width + t], V_, "tokens of seen other than -1");
    auto add_one = [&](const Tensor& counts) {
      for (int64_t b = 0; b < B_; ++b) ++counts.data_ptr<int64_t>()[b];
    };
    SampleArgs& sample = sample_->args;
    sample.positions = real.const_data_ptr<int64_t>();
    sample.tokens = past, sample.stride_tokens_b = width;
    for (int64_t turn = 0; turn < turns; ++turn) {
      int64_t next = column + turn + 1;
      add_one(lengths), add_one(real);
      if (positions) add_one(*positions);
      sample.T = past ? next : 0;
      {
        pybind11::gil_scoped_release release;
        run(tokens, positions, lengths, starts, next - 1, phases_.size());
      }
      if (!is_drawable(logits_, sample.temperature > 0)) refuse_logits(real, seen);
      bool ended = false;
      for (int64_t b = 0; b < B_; ++b) {
        bool lives = alive.const_data_ptr<bool>()[b];
        int64_t token = lives ? drawn_[b] : pad;
        ended = ended || (lives && std::find(ends.begin(), ends.end(), token) != ends.end());
        tokens.data_ptr<int64_t>()[b] = out.data_ptr<int64_t>()[b * turns + turn] = token;
        if (past) past[b * width + next] = token;
      }
      if (PyErr_CheckSignals()) throw pybind11::error_already_set();  // Ctrl-C must not wait for the last token
      if (ended) return turn + 1;
    }
    return turns;
  }

 private:
  void check_rows(const Tensor& tokens, const OptionalTensor& positions, const Tensor& lengths,
                  const OptionalTensor& starts, int64_t column, int64_t turns) const {
    checked(tokens, {B_, 1}, at::kLong, "tokens");
    checked(lengths, {B_}, at::kLong, "lengths");
    if (positions) checked(*positions, {B_, 1}, at::kLong, "positions");
    if (starts) checked(*starts, {B_}, at::kLong, "starts");
    int64_t room = attentions_.empty() ? P_ : attentions_[0]->args.S;
    TORCH_CHECK_VALUE(column >= 0 && column + turns <= room, "gpt2fast::DecodeStep: column must lie in [0, ",
                      room + 1 - turns, "), got ", column);
  }

  // Raises the op's error for logits that nothing can be drawn from.
  void refuse_logits(const Tensor& real, const OptionalTensor& seen) const {
    const SampleArgs& a = sample_->args;
    OptionalTensor past = seen ? OptionalTensor(seen->narrow(1, 0, a.T)) : std::nullopt;
    fall_back<Tensor>("gpt2fast::sample", logits_, seed_, real, past, rows_, double(a.temperature), a.top_k,
                      double(a.top_p), double(a.min_p), double(a.repetition_penalty));
    TORCH_INTERNAL_ASSERT(false, "gpt2fast::DecodeStep: the op sample takes logits that nothing can be drawn from");
  }

  void run(const Tensor& tokens, const OptionalTensor& positions, const Tensor& lengths, const OptionalTensor& starts,
           int64_t column, size_t phases) {
    check_range(tokens, V_, "tokens");
    positions ? check_range(*positions, P_, "positions") : check_range(column, P_, "positions");
    auto place = [&](auto& args) {
      args.tokens = tokens.const_data_ptr<int64_t>();
      args.positions = data<int64_t>(positions);
      args.start = column;
    };
    embedding_ ? place(embedding_->args) : place(packed_embedding_->args);
    for (Append* append : appends_) append->column = column;
    for (auto* attention : attentions_) {
      attention->args.lengths = lengths.const_data_ptr<int64_t>();
      attention->args.starts = data<int64_t>(starts);
    }
    run_phases(phases_, phases);
  }

  KernelPhase<SampleArgs>* sample_ = nullptr;  // the last phase
  int64_t* drawn_ = nullptr;                   // (B), its result
  Tensor seed_;
  OptionalTensor rows_;
};

}  // namespace

void bind_decode_step(pybind11::module_& m) {
  pybind11::class_<DecodeStep>(m, "DecodeStep", "A decoding step of GPT-2 for a batch of this size: gpt2fast/step.py")
      .def(pybind11::init<int64_t, int64_t, int64_t, double, const std::string&,
                          const std::vector<DecodeStep::Parameters>&, const std::vector<double>&,
                          const DecodeStep::Parameters&, const Tensor&, const Tensor&, const Tensor&,
                          const DecodeStep::Parameters&>())
      .def("set_cache", &DecodeStep::set_cache)
      .def("logits", &DecodeStep::logits)
      .def("set_draw", &DecodeStep::set_draw)
      .def("decode", &DecodeStep::decode);
}

}  // namespace gpt2fast
