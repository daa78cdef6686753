// One plain struct per op: all that a kernel is told, on every backend. No torch here.
// Strides are in elements, offsets 64-bit; a null pointer means that the optional tensor is absent.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace gpt2fast {

enum class Activation : int32_t { kNone, kGeluTanh, kGeluErf };

// out (B*T, C) = wte[tokens] + wpe[positions] (+ wte[token_types])
struct EmbeddingArgs {
  const int64_t *tokens, *positions, *token_types;  // (B, T) each; positions null: start + t; token_types may be null
  const void *wte, *wpe;                            // (V, C), (P, C)
  void* out;
  int64_t B, T, C, V, P, start;
  int64_t positions_stride_b;  // 0 when one row of positions serves the whole batch
  int64_t stride_wte, stride_wpe;
  DType dtype;
};

// The gradient of one table: out[row[n]] += dy[source[n] % R] for n = 0, 1, ..., N - 1
struct EmbeddingBackwardArgs {
  const int64_t *row, *source;  // (N); row is sorted, and rows that out does not have are skipped
  const void* dy;               // (R, C)
  void* out;                    // (count, C): zeros; rows that nothing is added to stay as they are
  float* parts;                 // (2 ceil(N / 256), C): workspace, may be null for N up to 256
  int64_t N, R, C, count;
  int64_t stride_dy_r;
  DType dtype;
};

// s = x + residual (s = x without residual); y = (s - mean(s)) * rstd * weight + bias
struct LayerNormArgs {
  const void *x, *residual, *weight, *bias;
  void *y, *sum;       // sum (R, C): written only where residual is given
  float *mean, *rstd;  // (R)
  int64_t R, C;
  int64_t stride_x_r, stride_residual_r;
  float eps;
  DType dtype;
};

// dx = rstd (g - avg(g) - n avg(g n)), g = dy weight, n = (x - mean) rstd; dweight = sum of dy n, dbias = sum of dy
struct LayerNormBackwardArgs {
  const void *dy, *x, *weight;
  const float *mean, *rstd;  // (R), as layer_norm gave them
  void *dx, *dweight, *dbias;
  float* partial;   // (P, 2, C): workspace, what each of P groups of rows adds to dweight and to dbias
  int64_t R, C, P;  // P at least 1
  int64_t stride_dy_r, stride_x_r;
  DType dtype;
};

// y = activation(x @ W + bias) + residual; W is weight (K, N), or weight^T when transposed (N, K)
struct LinearArgs {
  const void *x, *weight, *bias, *residual;  // (M, K), (K, N) or (N, K), (N), (M, N)
  void *y, *preactivation;                   // (M, N), contiguous; preactivation may be null
  int64_t M, K, N;
  int64_t stride_x_m, stride_weight, stride_residual_m;  // stride_weight: of weight's outer dimension
  bool transposed;
  Activation activation;
  DType dtype;
};

// out = activation(a @ b + bias) + residual; backward: out = (a @ b) activation'(preactivation)
struct ProductArgs {
  const void *a, *b, *bias, *residual;  // (M, K), (K, N), (N), (M, N); bias and residual may be null
  void *out, *preactivation;            // (M, N), preactivation contiguous: written where it is not null, backward read
  void* sums;                           // of the columns of b (N), or of the rows of a (M); may be null
  int64_t M, K, N;
  int64_t stride_a_m, stride_a_k, stride_b_k, stride_b_n, stride_residual_m, stride_out_m;
  bool backward, sums_of_a;
  bool wide;  // out and residual are float32, whatever dtype is, and nothing else follows a @ b
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

// out = softmax(scale * q k^T + bias, over visible keys) v; lse = log of the sum of exponentials.
// Query i of T sees key j of S if j <= S - T + i (causal), j > S - T + i - window (window > 0) and mask[b, j].
struct AttentionArgs {
  const void *q, *k, *v;  // (B, T, H, D), (B, S, H, D); innermost stride 1
  const bool* mask;       // (B, S) or null; true = visible
  const void* bias;       // (B|1, H|1, T|1, S|1) in q's dtype or null; stride 0 where broadcast
  void* out;              // (B, T, H, D) contiguous
  float* lse;             // (B, H, T) contiguous
  int64_t B, T, S, H, D;
  int64_t stride_q[3], stride_k[3], stride_v[3];  // of B, T or S, H
  int64_t stride_mask_b, stride_bias[4];
  int64_t window;  // 0: unlimited
  bool causal;
  float scale;
  float dropout_p;      // each probability is kept with 1 - dropout_p and scaled by 1 / (1 - dropout_p)
  const int64_t* seed;  // one int64, read where dropout_p > 0: Philox key of the mask (math.h)
  DType dtype;
};

// With p the probabilities after dropout, dp = dout v^T and delta = rowsum(dout out): ds = p (dp - delta),
// dq = scale ds k, dk = scale ds^T q, dv = p^T dout, dbias = ds summed where bias broadcasts.
struct AttentionBackwardArgs {
  AttentionArgs attention;     // with out (B, T, H, D) and lse as attention gave them; both are read
  const void* dout;            // (B, T, H, D); innermost stride 1
  void *dq, *dk, *dv, *dbias;  // contiguous, as q, k, v and bias; dbias null where there is no bias
  float *delta, *excess;       // (B, H, T): workspace
  int64_t stride_dout[3], stride_out[3];
};

// As attention, causal, over a cache of which row b holds lengths[b] keys (the T new ones included), the first
// starts[b] of them padding.
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

// loss of row r = lse - (1 - e) * logits[target] - e * mean(logits), 0 where target == ignore_index; e =
// label_smoothing
struct CrossEntropyArgs {
  const void* logits;  // (R, V)
  const int64_t* targets;
  float *loss, *lse;  // (R): per-row loss; the reduction is done by the caller over R floats
  int64_t R, V, stride_logits_r, ignore_index;
  float label_smoothing;
  DType dtype;
};

// out = the sum of the rows' losses, or their mean over the rows whose target is not ignore_index
struct CrossEntropyReduceArgs {
  const float* loss;       // (R)
  const int64_t* targets;  // (R), looked at for the mean
  float* out;              // one number
  int64_t R, ignore_index;
  bool mean;
};

// dlogits = dloss (softmax(logits) - (1 - e) onehot(target) - e / V), 0 in ignored rows; for the mean, dloss over the
// number of the others
struct CrossEntropyBackwardArgs {
  const float* dloss;  // (R), or one number where stride_dloss is 0
  const void* logits;  // (R, V)
  const int64_t* targets;
  const float* lse;  // (R), as cross_entropy gave it
  void* dlogits;     // (R, V), contiguous
  float* scale;      // one number, workspace of the mean; null otherwise
  int64_t R, V, stride_dloss, stride_logits_r, ignore_index;
  float label_smoothing;
  bool mean;
  DType dtype;
};

// What linear_cross_entropy does between its products: loss and lse of rows of logits, as cross_entropy has them, and
// in their place dloss (softmax(logits) - (1 - e) onehot(target) - e / V), 0 in ignored rows and beyond the V columns
struct LinearCrossEntropyArgs {
  void* logits;  // (R, V), rows that begin at multiples of 16 bytes and have less than 512 bytes of padding
  const int64_t* targets;
  float *loss, *lse;   // (R)
  const float* dloss;  // (R), or one number where stride_dloss is 0, or null for 1
  int64_t R, V, stride_logits_r, stride_dloss, ignore_index;
  float label_smoothing;
  bool gradients;  // logits become their gradients, else they stay
  DType dtype;
};

// One draw per row, in transformers' order: repetition penalty, temperature, top-k, top-p, min-p.
struct SampleArgs {
  const void* logits;                        // (B, V)
  const int64_t *tokens, *seed, *positions;  // earlier tokens (B, T) or null, -1 = none; (1); (B)
  const int64_t* rows;                       // (B) stream ids, or null: the row's index
  int64_t* out;                              // (B)
  int64_t B, T, V, stride_logits_b, stride_tokens_b;
  float temperature, top_p, min_p, repetition_penalty;  // temperature 0: argmax
  int64_t top_k;                                        // 0: off
  DType dtype;
};

// One step of AdamW on the tensors of a list, in place, with g the gradient times scale: m += rest1 (g - m),
// v = beta2 v + rest2 g^2, w = decay w - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps).
struct AdamwArgs {
  const int64_t* tensors;     // (n, 5) of each: the addresses of weight, gradient, m and v, and how many numbers it has
  const int32_t* programs;    // (P, 2) of each block of numbers: its tensor, and which block of that it is
  const float *step, *scale;  // one number each; scale may be null
  const int64_t* seed;        // one number, or null: key of the random rounding of weights in bfloat16
  int64_t P;
  bool aligned;                                                     // all addresses are multiples of 16
  float lr, beta2, rest1, rest2, log_beta1, log_beta2, eps, decay;  // rest: 1 - beta, before it is rounded to float
  DType dtype;                                                      // of weights and gradients; m and v are float32
};

// norm = the root of the sum of squares of all numbers of a list of tensors; factor = min(max_norm / (norm + eps), 1)
struct GradientNormArgs {
  const int64_t* tensors;   // (n, 5) of each: its address, three that are not looked at, and how many numbers it has
  const int32_t* programs;  // (P, 2) of each block of numbers: its tensor, and which block of that it is
  float *squares, *norm, *factor;  // workspace (P); one number each
  int64_t P;
  bool aligned;  // all addresses are multiples of 16
  float max_norm, eps;
  DType dtype;
};

}  // namespace gpt2fast
