// One plain struct per op. It has all the arguments of a C++ or CUDA kernel, which knows nothing of torch.
//
// Strides are in elements. Offsets are 64-bit. Tensors are contiguous unless they have strides. A null pointer means
// that an optional tensor is absent.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace gpt2fast {

enum class Activation : int32_t { kNone, kGeluTanh, kGeluErf };

// out (B*T, C) = wte[tokens] + wpe[positions] (+ wte[token_types])
struct EmbeddingArgs {
  const int64_t *tokens, *positions, *token_types;  // (B, T) each; null positions: start + t; token_types may be null
  const void *wte, *wpe;                            // (V, C), (P, C)
  void* out;
  int64_t B, T, C, V, P, start;
  int64_t positions_stride_b;  // 0 if one row of positions serves the whole batch
  int64_t stride_wte, stride_wpe;
  DType dtype;
};

// The numbers of outputs and of inputs that lie together in a packed weight. The layout is drawn in packed_linear.h.
constexpr int64_t kPackedOutputs = 16, kPackedInputs = 32;
constexpr int64_t kInt8GroupBytes = kPackedOutputs * kPackedInputs;                           // a byte a number
constexpr int64_t kInt4GroupBytes = kPackedOutputs * kPackedInputs / 2 + 2 * kPackedOutputs;  // halves, then scales

// y = activation(x^ @ W + bias) + residual, where x^ is x rounded to 8 bits and W is packed in 8 or 4 bits
struct PackedLinearArgs {
  const void *x, *bias, *residual;  // (M, K), (N), (M, N); bias and residual may be null
  const uint8_t* weight;            // (ceil(N / 16), ceil(K / 32), 512) or, for 4 bits, (..., 288)
  const float* scale;               // (N); for 4 bits null, since the scales are in weight
  void* y;                          // (M, N)
  int64_t M, K, N;
  int64_t stride_x_m, stride_residual_m;
  Activation activation;
  DType dtype;
};

// out (B*T, C) = wte[tokens] + wpe[positions] (+ wte[token_types]), where wte is packed in 8 bits
struct PackedEmbeddingArgs {
  const int64_t *tokens, *positions, *token_types;  // as in EmbeddingArgs
  const uint8_t* wte;                               // (ceil(V / 16), ceil(C / 32), 512)
  const float* scale;                               // (V)
  const void* wpe;                                  // (P, C)
  void* out;
  int64_t B, T, C, V, P, start;
  int64_t positions_stride_b, stride_wpe;
  DType dtype;
};

// The gradient of one table: out[row[n]] += dy[source[n] % R] for n = 0, 1, ..., N - 1
struct EmbeddingBackwardArgs {
  const int64_t *row, *source;  // (N) each; row is sorted, and rows that out does not have are skipped
  const void* dy;               // (R, C)
  void* out;                    // (count, C), zeros on entry; rows to which nothing is added are not written
  float* parts;                 // (2 ceil(N / 256), C): workspace; may be null if N is at most 256
  int64_t N, R, C, count;
  int64_t stride_dy_r;
  DType dtype;
};

// s = x + residual (s = x without residual); y = (s - mean(s)) * rstd * weight + bias
struct LayerNormArgs {
  const void *x, *residual, *weight, *bias;
  void *y, *sum;       // (R, C) each; sum is written only if residual is given
  float *mean, *rstd;  // (R)
  int64_t R, C;
  int64_t stride_x_r, stride_residual_r;
  float eps;
  DType dtype;
};

// dx = rstd (g - avg(g) - n avg(g n)), g = dy weight, n = (x - mean) rstd; dweight = sum of dy n, dbias = sum of dy
struct LayerNormBackwardArgs {
  const void *dy, *x, *weight;
  const float *mean, *rstd;  // (R) each, from layer_norm
  void *dx, *dweight, *dbias;
  float* partial;   // (P, 2, C): workspace for the shares of P groups of rows in dweight and in dbias
  int64_t R, C, P;  // P at least 1
  int64_t stride_dy_r, stride_x_r;
  DType dtype;
};

// y = activation(x @ W + bias) + residual. W is weight (K, N) or, if transposed, the transpose of weight (N, K).
struct LinearArgs {
  const void *x, *weight, *bias, *residual;  // (M, K), (K, N) or (N, K), (N), (M, N)
  void *y, *preactivation;                   // (M, N), contiguous; preactivation may be null
  int64_t M, K, N;
  int64_t stride_x_m, stride_weight, stride_residual_m;  // stride_weight is that of weight's first dimension
  bool transposed;
  Activation activation;
  DType dtype;
};

// out = activation(a @ b + bias) + residual. If backward: out = (a @ b) activation'(preactivation).
struct ProductArgs {
  const void *a, *b, *bias, *residual;  // (M, K), (K, N), (N), (M, N); bias and residual may be null
  void *out, *preactivation;            // (M, N); preactivation may be null, is contiguous, and is read if backward
  void* sums;                           // of the columns of b (N) or, if sums_of_a, of the rows of a (M); may be null
  int64_t M, K, N;
  int64_t stride_a_m, stride_a_k, stride_b_k, stride_b_n, stride_residual_m, stride_out_m;
  bool backward, sums_of_a;
  bool wide;  // out and residual are float32, whatever dtype is; there is no bias and no activation
  Activation activation;
  DType dtype;
};

// y = gelu(x + bias); bias may be null
struct GeluArgs {
  const void *x, *bias;
  void* y;
  int64_t R, C;
  int64_t stride_x_r;
  Activation activation;  // kGeluTanh or kGeluErf
  DType dtype;
};

// dx = dy gelu'(x)
struct GeluBackwardArgs {
  const void *dy, *x;
  void* dx;
  int64_t R, C;
  int64_t stride_dy_r, stride_x_r;
  Activation activation;
  DType dtype;
};

// out = softmax(scale q k^T + bias) v over the keys that each query sees; lse = log sum exp of the same scores.
// Query i of T sees key j of S if j <= S - T + i (if causal), j > S - T + i - window (if window > 0) and mask[b, j].
struct AttentionArgs {
  const void *q, *k, *v;  // (B, T, H, D), (B, S, H, D); innermost stride 1
  const bool* mask;       // (B, S) or null; true means visible
  const void* bias;       // (B or 1, H or 1, T or 1, S or 1) in q's dtype, or null; stride 0 where it broadcasts
  void* out;              // (B, T, H, D) contiguous
  float* lse;             // (B, H, T) contiguous
  int64_t B, T, S, H, D;
  int64_t stride_q[3], stride_k[3], stride_v[3];  // of B, T or S, H
  int64_t stride_mask_b, stride_bias[4];
  int64_t window;  // 0 means unlimited
  bool causal;
  float scale;
  float dropout_p;      // a probability is kept with chance 1 - dropout_p, and is then divided by 1 - dropout_p
  const int64_t* seed;  // one int64, read if dropout_p > 0: the Philox key of the dropout mask (math.h)
  DType dtype;
};

// With p the probabilities, dp = dout v^T and delta = rowsum(dout out): ds = p (dp - delta), dq = scale ds k,
// dk = scale ds^T q, dv = p^T dout, and dbias is ds summed where bias broadcasts. Dropout is applied to dp, and to the
// p of dv.
struct AttentionBackwardArgs {
  AttentionArgs attention;     // its out (B, T, H, D) and lse are read here, as attention has written them
  const void* dout;            // (B, T, H, D); innermost stride 1
  void *dq, *dk, *dv, *dbias;  // contiguous, of the shapes of q, k, v and bias; dbias is null if there is no bias
  float *delta, *excess;       // (B, H, T): workspace
  int64_t stride_dout[3], stride_out[3];
};

// Causal attention over a cache. Row b has lengths[b] keys, with the T new ones at the end. Its first starts[b] keys
// are padding, which no query sees.
struct DecodeAttentionArgs {
  const void *q, *k, *v;            // (B, T, H, D), (B, S, H, D): S is the cache's capacity
  const int64_t *lengths, *starts;  // (B); starts may be null
  void* out;                        // (B, T, H, D) contiguous
  int64_t B, T, S, H, D;
  int64_t stride_q[3], stride_k[3], stride_v[3];
  int64_t window;
  float scale;
  DType dtype;
};

// The loss of a row is lse - (1 - e) logits[target] - e avg(logits), with e = label_smoothing. It is 0 if the target is
// ignore_index.
struct CrossEntropyArgs {
  const void* logits;  // (R, V)
  const int64_t* targets;
  float *loss, *lse;  // (R) each; the caller reduces the losses
  int64_t R, V, stride_logits_r, ignore_index;
  float label_smoothing;
  DType dtype;
};

// out is the sum of the losses, or their mean over the rows whose target is not ignore_index.
struct CrossEntropyReduceArgs {
  const float* loss;       // (R)
  const int64_t* targets;  // (R), read for the mean only
  float* out;              // one number
  int64_t R, ignore_index;
  bool mean;
};

// dlogits = dloss (softmax(logits) - (1 - e) onehot(target) - e / V), and 0 in rows whose target is ignore_index. For
// the mean, dloss is divided by the number of the other rows.
struct CrossEntropyBackwardArgs {
  const float* dloss;  // (R), or one number if stride_dloss is 0
  const void* logits;  // (R, V)
  const int64_t* targets;
  const float* lse;  // (R), from cross_entropy
  void* dlogits;     // (R, V), contiguous
  float* scale;      // one number: workspace for the mean; otherwise null
  int64_t R, V, stride_dloss, stride_logits_r, ignore_index;
  float label_smoothing;
  bool mean;
  DType dtype;
};

// The step of linear_cross_entropy between its products. It computes loss and lse of the rows of logits, as
// cross_entropy does. If gradients, it then writes dloss (softmax(logits) - (1 - e) onehot(target) - e / V) over the
// logits, and 0 in ignored rows and in the columns after the first V.
struct LinearCrossEntropyArgs {
  void* logits;  // (R, V); rows begin at multiples of 16 bytes and have less than 512 bytes of padding
  const int64_t* targets;
  float *loss, *lse;   // (R) each
  const float* dloss;  // (R), or one number if stride_dloss is 0, or null for 1
  int64_t R, V, stride_logits_r, stride_dloss, ignore_index;
  float label_smoothing;
  bool gradients;  // the logits become their gradients; otherwise they stay
  DType dtype;
};

// One token per row, drawn after repetition penalty, temperature, top-k, top-p and min-p, in the order of transformers.
struct SampleArgs {
  const void* logits;                        // (B, V)
  const int64_t *tokens, *seed, *positions;  // (B, T) earlier tokens (-1 for none) or null; (1); (B)
  const int64_t* rows;                       // (B), or null for 0 ... B - 1; a draw depends on seed, rows and positions
  int64_t* out;                              // (B)
  int64_t B, T, V, stride_logits_b, stride_tokens_b;
  float temperature, top_p, min_p, repetition_penalty;  // temperature 0 means the likeliest token
  int64_t top_k;                                        // 0 means off
  DType dtype;
};

// One step of AdamW on a list of tensors, in place. With g the gradient times scale: m += rest1 (g - m),
// v = beta2 v + rest2 g^2, w = decay w - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps).
struct AdamwArgs {
  const int64_t* tensors;     // (n, 5): the addresses of weight, gradient, m and v, and the count of numbers
  const int32_t* programs;    // (P, 2), for each block of numbers: its tensor, and which block of that tensor it is
  const float *step, *scale;  // one number each; scale may be null
  const int64_t* seed;        // one number, the key of the random rounding of bfloat16 weights; or null
  int64_t P;
  bool aligned;                                                     // all addresses are multiples of 16
  float lr, beta2, rest1, rest2, log_beta1, log_beta2, eps, decay;  // rest: 1 - beta, computed in double precision
  DType dtype;                                                      // of weights and gradients; m and v are float32
};

// norm = sqrt(sum of the squares of all numbers of a list of tensors); factor = min(max_norm / (norm + eps), 1).
struct GradientNormArgs {
  const int64_t* tensors;   // (n, 5): the address, three unused numbers, and the count of numbers
  const int32_t* programs;  // (P, 2), for each block of numbers: its tensor, and which block of that tensor it is
  float *squares, *norm, *factor;  // squares (P) is workspace; norm and factor are one number each
  int64_t P;
  bool aligned;  // all addresses are multiples of 16
  float max_norm, eps;
  DType dtype;
};

}  // namespace gpt2fast
