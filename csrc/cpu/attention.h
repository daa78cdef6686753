// out = softmax(scale * q k^T + bias, over visible keys) v. A unit is a block of queries of one head, a task one unit
// or several tiny ones; long and short causal units alternate, so that any run of tasks is balanced.
#pragma once
#include "attention_tile.h"

namespace gpt2fast {
namespace {

struct AttentionUnits {
  int64_t rows, blocks, count, per_task;

  explicit AttentionUnits(const AttentionArgs& a) {
    rows = max64(1, min64(a.T, kQueriesPerTask));
    blocks = ceil_div(a.T, rows);
    count = a.B * a.H * blocks;
    per_task = max64(1, (int64_t(1) << 17) / max64(1, a.S * a.D * (rows + 8)));
  }
};

inline int64_t attention_tasks(const AttentionArgs& a) {
  AttentionUnits units(a);
  return ceil_div(units.count, units.per_task);
}

inline void attention_run(const AttentionArgs& a, int64_t begin, int64_t end) {
  AttentionUnits units(a);
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t u = begin * units.per_task; u < min64(end * units.per_task, units.count); ++u) {
      int64_t i = u % units.blocks, b = u / units.blocks / a.H, h = u / units.blocks % a.H;
      int64_t row = (i & 1 ? units.blocks - 1 - i / 2 : i / 2) * units.rows;
      Head<T> head = {};
      head.q = (const T*)a.q + b * a.stride_q[0] + h * a.stride_q[2];
      head.k = (const T*)a.k + b * a.stride_k[0] + h * a.stride_k[2];
      head.v = (const T*)a.v + b * a.stride_v[0] + h * a.stride_v[2];
      head.stride_q = a.stride_q[1], head.stride_k = a.stride_k[1], head.stride_v = a.stride_v[1];
      head.out = (T*)a.out + (b * a.T * a.H + h) * a.D;
      head.stride_out = a.H * a.D;
      if (a.lse) head.lse = a.lse + (b * a.H + h) * a.T;
      if (a.mask) head.mask = a.mask + b * a.stride_mask_b;
      if (a.bias) head.bias = (const T*)a.bias + b * a.stride_bias[0] + h * a.stride_bias[1];
      head.stride_bias[0] = a.stride_bias[2], head.stride_bias[1] = a.stride_bias[3];
      head.S = a.S, head.D = a.D;
      head.offset = a.S - a.T;
      head.window = a.window, head.causal = a.causal;
      head.scale = a.scale;
      head.dropout_p = a.dropout_p;
      head.seed = a.dropout_p > 0 ? uint64_t(*a.seed) : 0;
      head.row = uint64_t((b * a.H + h) * a.T);
      AttentionTile<T>(head, row, min64(row + units.rows, a.T)).run();
    }
  });
}

}  // namespace
}  // namespace gpt2fast
