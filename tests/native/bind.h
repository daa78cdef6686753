// A case's tensors to the args of its kernel, as csrc/torch/NAME.cpp does from torch's tensors; every kernel by its op.
#pragma once
#include <atomic>
#include <cmath>
#include <thread>

#include "../../csrc/cpu/dispatch.h"
#include "cases.h"
#include "guarded.h"

// The memory of one run: inputs copied, outputs filled with NaN.
struct Run {
  const Case& c;
  const Draw& draw;
  std::map<std::string, Guarded> in, out;

  Run(const Case& of, const Draw& drawn, Guarded::Side side) : c(of), draw(drawn) {
    for (auto& [name, input] : draw.inputs) in.emplace(name, Guarded(input.memory.data(), input.memory.size(), side));
    for (size_t i = 0; i < c.outputs.size(); ++i)
      out.emplace(c.outputs[i].name, Guarded(draw.truths[i].size() * size_of(c.outputs[i].dtype), side));
  }

  bool has(const char* name) const { return draw.inputs.count(name) > 0; }
  template <class T = void>
  const T* input(const char* name) const {
    return has(name) ? (const T*)in.at(name).data() : nullptr;
  }
  // Null for an output of no elements, which a caller need not have.
  template <class T = void>
  T* output(const char* name) const {
    const Guarded& g = out.at(name);
    return g.size() ? (T*)g.data() : nullptr;
  }
  // Dimensions count from the end where negative.
  int64_t size(const char* name, int dim) const {
    auto& sizes = draw.inputs.at(name).sizes;
    return sizes[size_t(dim < 0 ? dim + int(sizes.size()) : dim)];
  }
  int64_t stride(const char* name, int dim) const {
    if (!has(name)) return 0;
    auto& strides = draw.inputs.at(name).strides;
    return strides[size_t(dim < 0 ? dim + int(strides.size()) : dim)];
  }
  int64_t rows(const char* name) const {
    auto& sizes = draw.inputs.at(name).sizes;
    int64_t count = 1;
    for (size_t d = 0; d + 1 < sizes.size(); ++d) count *= sizes[d];
    return count;
  }
  double number(const char* name) const { return std::stod(c.plain.at(name)); }
  int64_t whole(const char* name) const { return int64_t(number(name)); }
  const std::string& word(const char* name) const { return c.plain.at(name); }
};

namespace bind {

using namespace gpt2fast;

inline Activation gelu_form(const Run& r) {
  return r.word("approximate") == "tanh" ? Activation::kGeluTanh : Activation::kGeluErf;
}

inline EmbeddingArgs embedding(const Run& r) {
  int64_t B = r.size("tokens", 0), T = r.size("tokens", 1);
  int64_t stride = r.has("positions") && r.size("positions", 0) != 1 ? T : 0;
  return {r.input<int64_t>("tokens"),
          r.input<int64_t>("positions"),
          r.input<int64_t>("token_types"),
          r.input("wte"),
          r.input("wpe"),
          r.output("y"),
          B,
          T,
          r.size("wte", 1),
          r.size("wte", 0),
          r.size("wpe", 0),
          r.whole("start"),
          stride,
          r.stride("wte", 0),
          r.stride("wpe", 0),
          r.c.dtype};
}

inline LayerNormArgs layer_norm(const Run& r) {
  return {r.input("x"),
          r.input("residual"),
          r.input("weight"),
          r.input("bias"),
          r.output("y"),
          r.has("residual") ? r.output("sum") : nullptr,
          r.output<float>("mean"),
          r.output<float>("rstd"),
          r.rows("x"),
          r.size("x", -1),
          r.stride("x", -2),
          r.stride("residual", -2),
          float(r.number("eps")),
          r.c.dtype};
}

inline Activation activation_of(const Run& r) {
  const std::string& word = r.word("activation");
  return word == "none" ? Activation::kNone : word == "gelu_tanh" ? Activation::kGeluTanh : Activation::kGeluErf;
}

inline LinearArgs linear(const Run& r) {
  bool transposed = r.number("transposed") != 0;
  return {r.input("x"),        r.input("weight"),     r.input("bias"),
          r.input("residual"), r.output("y"),         r.output("preactivation"),
          r.rows("x"),         r.size("x", -1),       r.size("weight", transposed ? 0 : 1),
          r.stride("x", -2),   r.stride("weight", 0), r.stride("residual", -2),
          transposed,          activation_of(r),      r.c.dtype};
}

// int8_linear, and int4_linear, which has a bias in every case and no scale.
inline PackedLinearArgs packed_linear(const Run& r) {
  return {r.input("x"),
          r.input("bias"),
          r.input("residual"),
          r.input<uint8_t>("weight"),
          r.input<float>("scale"),
          r.output("y"),
          r.rows("x"),
          r.size("x", -1),
          r.size(r.has("scale") ? "scale" : "bias", 0),
          r.stride("x", -2),
          r.stride("residual", -2),
          activation_of(r),
          r.c.dtype};
}

inline PackedEmbeddingArgs int8_embedding(const Run& r) {
  int64_t B = r.size("tokens", 0), T = r.size("tokens", 1);
  int64_t stride = r.has("positions") && r.size("positions", 0) != 1 ? T : 0;
  return {r.input<int64_t>("tokens"),
          r.input<int64_t>("positions"),
          r.input<int64_t>("token_types"),
          r.input<uint8_t>("wte"),
          r.input<float>("scale"),
          r.input("wpe"),
          r.output("y"),
          B,
          T,
          r.size("wpe", 1),
          r.size("scale", 0),
          r.size("wpe", 0),
          r.whole("start"),
          stride,
          r.stride("wpe", 0),
          r.c.dtype};
}

inline GeluArgs gelu(const Run& r) {
  return {r.input("x"),    r.input("bias"),   r.output("y"), r.rows("x"),
          r.size("x", -1), r.stride("x", -2), gelu_form(r),  r.c.dtype};
}

// What attention and decode_attention have in common.
template <class Args>
Args heads(const Run& r) {
  Args a{};
  a.q = r.input("q"), a.k = r.input("k"), a.v = r.input("v"), a.out = r.output("out");
  a.B = r.size("q", 0), a.T = r.size("q", 1), a.H = r.size("q", 2), a.D = r.size("q", 3), a.S = r.size("k", 1);
  for (int i = 0; i < 3; ++i)
    a.stride_q[i] = r.stride("q", i), a.stride_k[i] = r.stride("k", i), a.stride_v[i] = r.stride("v", i);
  a.window = r.whole("window");
  a.scale = r.c.plain.count("scale") ? float(r.number("scale")) : float(1 / std::sqrt(double(a.D)));
  a.dtype = r.c.dtype;
  return a;
}

inline AttentionArgs attention(const Run& r) {
  auto a = heads<AttentionArgs>(r);
  a.mask = r.input<bool>("mask"), a.bias = r.input("bias"), a.lse = r.output<float>("lse");
  a.stride_mask_b = r.stride("mask", 0);
  for (int i = 0; i < 4 && r.has("bias"); ++i) a.stride_bias[i] = r.size("bias", i) == 1 ? 0 : r.stride("bias", i);
  a.causal = r.number("causal") != 0;
  a.dropout_p = float(r.number("dropout_p")), a.seed = r.input<int64_t>("seed");
  return a;
}

inline DecodeAttentionArgs decode_attention(const Run& r) {
  auto a = heads<DecodeAttentionArgs>(r);
  a.lengths = r.input<int64_t>("lengths"), a.starts = r.input<int64_t>("starts");
  return a;
}

inline CrossEntropyArgs cross_entropy(const Run& r) {
  return {r.input("logits"),
          r.input<int64_t>("targets"),
          r.output<float>("loss"),
          r.output<float>("lse"),
          r.size("logits", 0),
          r.size("logits", 1),
          r.stride("logits", 0),
          r.whole("ignore_index"),
          float(r.number("label_smoothing")),
          r.c.dtype};
}

inline SampleArgs sample(const Run& r) {
  return {r.input("logits"),
          r.input<int64_t>("tokens"),
          r.input<int64_t>("seed"),
          r.input<int64_t>("positions"),
          r.input<int64_t>("rows"),
          r.output<int64_t>("out"),
          r.size("logits", 0),
          r.has("tokens") ? r.size("tokens", 1) : 0,
          r.size("logits", 1),
          r.stride("logits", 0),
          r.stride("tokens", 0),
          float(r.number("temperature")),
          float(r.number("top_p")),
          float(r.number("min_p")),
          float(r.number("repetition_penalty")),
          r.whole("top_k"),
          r.c.dtype};
}

// How the tasks of a call run: in one go; one by one from the last; by four threads, each of which takes the next.
enum class Order { kTogether, kOneByOne, kThreads };

template <class Args>
void launch(const cpu::Kernel<Args>& kernel, const Args& args, Order order) {
  int64_t tasks = kernel.tasks(args);
  if (order == Order::kTogether && tasks) kernel.run(args, 0, tasks);
  if (order == Order::kOneByOne)
    for (int64_t t = tasks; t-- > 0;) kernel.run(args, t, t + 1);
  if (order == Order::kThreads) {
    std::atomic<int64_t> next{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i)
      threads.emplace_back([&] {
        for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) kernel.run(args, t, t + 1);
      });
    for (std::thread& thread : threads) thread.join();
  }
}

inline void run(const cpu::Table& table, const Run& r, Order order) {
  const std::string& op = r.c.op;
  if (op == "embedding") return launch(table.embedding, embedding(r), order);
  if (op == "layer_norm" || op == "add_layer_norm") return launch(table.layer_norm, layer_norm(r), order);
  if (op == "linear") return launch(table.linear, linear(r), order);
  if (op == "int8_linear") return launch(table.int8_linear, packed_linear(r), order);
  if (op == "int4_linear") return launch(table.int4_linear, packed_linear(r), order);
  if (op == "int8_embedding") return launch(table.int8_embedding, int8_embedding(r), order);
  if (op == "gelu" || op == "bias_gelu") return launch(table.gelu, gelu(r), order);
  if (op == "attention") return launch(table.attention, attention(r), order);
  if (op == "decode_attention") return launch(table.decode_attention, decode_attention(r), order);
  if (op == "cross_entropy") return launch(table.cross_entropy, cross_entropy(r), order);
  if (op == "sample") return launch(table.sample, sample(r), order);
  throw std::runtime_error("tests/native/bind.h: run() must know " + op + ", whose kernel csrc/cpu/dispatch.h has");
}

}  // namespace bind
