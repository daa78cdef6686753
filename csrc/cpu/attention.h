// out = softmax(scale * q k^T + bias) v, where each query sees its visible keys only. This file turns the op's
// arguments into heads; attention_tile.h computes. A unit of work is a block of queries of one head. A task is one
// unit, or several tiny ones. docs/how/attention.md explains the algorithm step by step.
#pragma once
#include "attention_tile.h"

namespace gpt2fast {
namespace {

inline AttentionUnits attention_units(const AttentionArgs& a) { return {a.B, a.H, a.T, a.S, a.D}; }

inline int64_t attention_tasks(const AttentionArgs& a) { return attention_units(a).tasks(); }

inline void attention_run(const AttentionArgs& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    attention_units(a).run<T>(begin, end, [&](int64_t b, int64_t h) {
      Head<T> head = head_of<T>(a, b, h);
      if (a.lse) head.lse = a.lse + (b * a.H + h) * a.T;
      if (a.mask) head.mask = a.mask + b * a.stride_mask_b;
      if (a.bias) head.bias = (const T*)a.bias + b * a.stride_bias[0] + h * a.stride_bias[1];
      head.stride_bias[0] = a.stride_bias[2], head.stride_bias[1] = a.stride_bias[3];
      head.S = a.S;
      head.offset = a.S - a.T;
      head.causal = a.causal;
      head.dropout_p = a.dropout_p;
      head.seed = a.dropout_p > 0 ? uint64_t(*a.seed) : 0;
      head.row = uint64_t((b * a.H + h) * a.T);
      return head;
    });
  });
}

}  // namespace
}  // namespace gpt2fast
