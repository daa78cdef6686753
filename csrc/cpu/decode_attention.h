// Causal attention of the last T tokens of row b over a cache of lengths[b] keys. It runs the same tile as attention
// and therefore gives the same bits. A task is one unit of attention_tile.h (for few tokens, one head), or several
// where the cache is short. Keys and values are read once for all queries of a unit.
#pragma once
#include "attention_tile.h"

namespace gpt2fast {
namespace {

inline AttentionUnits decode_attention_units(const DecodeAttentionArgs& a) {
  int64_t longest = 0;
  for (int64_t b = 0; b < a.B; ++b) longest = max64(longest, min64(a.lengths[b], a.S));
  return {a.B, a.H, a.T, longest, a.D};
}

inline int64_t decode_attention_tasks(const DecodeAttentionArgs& a) { return decode_attention_units(a).tasks(); }

inline void decode_attention_run(const DecodeAttentionArgs& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    decode_attention_units(a).run<T>(begin, end, [&](int64_t b, int64_t h) {
      Head<T> head = head_of<T>(a, b, h);
      head.S = max64(0, min64(a.lengths[b], a.S));
      head.first = a.starts ? max64(0, a.starts[b]) : 0;
      head.offset = head.S - a.T;
      head.causal = true;
      return head;
    });
  });
}

}  // namespace
}  // namespace gpt2fast
