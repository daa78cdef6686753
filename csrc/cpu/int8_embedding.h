// out = wte[token] + wpe[position] (+ wte[token_type]), where wte is packed in 8 bits as in int8_linear.h. The sum is
// in float32 and rounded once. A task is a block of rows of out. Four neighbouring inputs of a row lie together, and
// the next four are a word of 64 bytes further.
#pragma once
#include "int8_linear.h"

namespace gpt2fast {
namespace {

constexpr int64_t kInt8EmbeddingRows = 16;

inline int64_t int8_embedding_tasks(const PackedEmbeddingArgs& a) {
  return a.C ? ceil_div(a.B * a.T, kInt8EmbeddingRows) : 0;
}

// Row `index` of a packed table, as floats, added to out (C) or, if `first`, written there.
inline void unpack_row(const PackedEmbeddingArgs& a, int64_t index, bool first, float* out) {
  int64_t groups = ceil_div(a.C, kPackedInputs);
  const uint8_t* p = a.wte + index / kPackedOutputs * groups * Int8Weight::kGroupBytes + index % kPackedOutputs * 4;
  float scale = a.scale[index];
  for (int64_t c = 0; c < a.C; ++c) {
    float value = float(int(p[c / 4 * 64 + c % 4]) - Int8Weight::kZero) * scale;
    out[c] = first ? value : out[c] + value;
  }
}

inline void int8_embedding_run(const PackedEmbeddingArgs& a, int64_t begin, int64_t end) {
  constexpr int L = Vec::kLanes;
  int64_t last = min64(end * kInt8EmbeddingRows, a.B * a.T);
  float* sum = (float*)scratch<0>(size_t(a.C + L) * sizeof(float));
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t r = begin * kInt8EmbeddingRows; r < last; ++r) {
      int64_t b = r / a.T, t = r - b * a.T;
      const T* position =
          (const T*)a.wpe + (a.positions ? a.positions[b * a.positions_stride_b + t] : a.start + t) * a.stride_wpe;
      T* out = (T*)a.out + r * a.C;
      unpack_row(a, a.tokens[r], true, sum);
      int64_t c = 0;
      for (; c + L <= a.C; c += L) (Vec::load(sum + c) + Vec::load(position + c)).store(sum + c);
      if (c < a.C)
        (Vec::load(sum + c, int(a.C - c)) + Vec::load(position + c, int(a.C - c))).store(sum + c, int(a.C - c));
      if (a.token_types) unpack_row(a, a.token_types[r], false, sum);
      for (c = 0; c + L <= a.C; c += L) Vec::load(sum + c).store(out + c);
      if (c < a.C) Vec::load(sum + c, int(a.C - c)).store(out + c, int(a.C - c));
    }
  });
}

}  // namespace
}  // namespace gpt2fast
