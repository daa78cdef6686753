// Causal attention of the last T tokens over a cache of lengths[b] keys: attention's own tile, hence its bits. A task
// is one head, or several where the cache is short; keys and values are read once for all T queries.
#pragma once
#include "attention_tile.h"

namespace gpt2fast {
namespace {

struct DecodeUnits {
  int64_t blocks, count, per_task;

  explicit DecodeUnits(const DecodeAttentionArgs& a) {
    blocks = ceil_div(a.T, kQueriesPerTask);
    count = a.B * a.H * blocks;
    int64_t longest = 1;
    for (int64_t b = 0; b < a.B; ++b) longest = max64(longest, min64(a.lengths[b], a.S));
    per_task = max64(1, (int64_t(1) << 17) / max64(1, longest * a.D * (min64(a.T, kQueriesPerTask) + 8)));
  }
};

inline int64_t decode_attention_tasks(const DecodeAttentionArgs& a) {
  DecodeUnits units(a);
  return ceil_div(units.count, units.per_task);
}

inline void decode_attention_run(const DecodeAttentionArgs& a, int64_t begin, int64_t end) {
  DecodeUnits units(a);
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t u = begin * units.per_task; u < min64(end * units.per_task, units.count); ++u) {
      int64_t b = u / units.blocks / a.H, h = u / units.blocks % a.H, row = u % units.blocks * kQueriesPerTask;
      Head<T> head = {};
      head.q = (const T*)a.q + b * a.stride_q[0] + h * a.stride_q[2];
      head.k = (const T*)a.k + b * a.stride_k[0] + h * a.stride_k[2];
      head.v = (const T*)a.v + b * a.stride_v[0] + h * a.stride_v[2];
      head.stride_q = a.stride_q[1], head.stride_k = a.stride_k[1], head.stride_v = a.stride_v[1];
      head.out = (T*)a.out + (b * a.T * a.H + h) * a.D;
      head.stride_out = a.H * a.D;
      head.S = max64(0, min64(a.lengths[b], a.S)), head.D = a.D;
      head.first = a.starts ? max64(0, a.starts[b]) : 0;
      head.offset = head.S - a.T;
      head.window = a.window, head.causal = true;
      head.scale = a.scale;
      AttentionTile<T>(head, row, min64(row + kQueriesPerTask, a.T)).run();
    }
  });
}

}  // namespace
}  // namespace gpt2fast
