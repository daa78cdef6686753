// out = wte[token] + wpe[position] (+ wte[token_type]), summed in float32. A task is a block of rows of out. The floor
// is memory: each row that is looked up is read once, and each row of out is written once.
#pragma once
#include "../ops.h"
#include "vec_math.h"

namespace gpt2fast {
namespace {

constexpr int64_t kTokensAhead = 3;  // rows of wte to prefetch; the CPU's own prefetchers cannot guess the next row

inline int64_t embedding_rows_per_task(const EmbeddingArgs& args) { return max64(1, 32768 / max64(1, args.C)); }

inline int64_t embedding_tasks(const EmbeddingArgs& args) {
  return args.C ? ceil_div(args.B * args.T, embedding_rows_per_task(args)) : 0;
}

template <bool kHasType, class T>
inline void embedding_row(const T* token, const T* position, const T* type, T* out, int64_t n) {
  int64_t i = 0;
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) {
    Vec v = Vec::load(token + i) + Vec::load(position + i);
    if constexpr (kHasType) v = v + Vec::load(type + i);
    v.store(out + i);
  }
  if (i == n) return;
  Vec v = Vec::load(token + i, int(n - i)) + Vec::load(position + i, int(n - i));
  if constexpr (kHasType) v = v + Vec::load(type + i, int(n - i));
  v.store(out + i, int(n - i));
}

inline void embedding_run(const EmbeddingArgs& args, int64_t begin, int64_t end) {
  int64_t rows = embedding_rows_per_task(args), first = begin * rows, last = min64(end * rows, args.B * args.T);
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T *wte = (const T*)args.wte, *wpe = (const T*)args.wpe;
    for (int64_t r = first; r < last; ++r) {
      int64_t b = r / args.T, t = r - b * args.T;
      int64_t p = args.positions ? args.positions[b * args.positions_stride_b + t] : args.start + t;
      const T *token = wte + args.tokens[r] * args.stride_wte, *position = wpe + p * args.stride_wpe;
      T* out = (T*)args.out + r * args.C;
      if (r + kTokensAhead < args.B * args.T) {
        const char* ahead = (const char*)(wte + args.tokens[r + kTokensAhead] * args.stride_wte);
        for (int64_t i = 0; i < args.C * int64_t(sizeof(T)); i += 64) prefetch(ahead + i);
      }
      if (args.token_types)
        embedding_row<true>(token, position, wte + args.token_types[r] * args.stride_wte, out, args.C);
      else
        embedding_row<false>(token, position, token, out, args.C);
    }
  });
}

}  // namespace
}  // namespace gpt2fast
