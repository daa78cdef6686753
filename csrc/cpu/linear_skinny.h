// linear for few rows and weight (K, N). The floor is reading the weight: with few rows that is the whole cost. So the
// weight is read once, in long contiguous pieces, and is never copied. A few of its rows at a time are read over the
// whole range of columns, and the partial sums stay in the L1 cache. The chains along k are the same as in linear.h.
#pragma once
#include "linear_pack.h"

namespace gpt2fast {
namespace {

constexpr int kSkinnyRows = 8;        // the most rows that are few
constexpr int64_t kBlockWords = 256;  // words of K in one chain; the chains are added up in order
constexpr int64_t kGroupWords = 8;    // words of K for which sums stay in registers

// sum (kRows, kVecs vectors of columns) += x @ weight over a few words along k: a part of a chain.
template <class T, int kRows, int kVecs, bool kTail>
inline void advance(const float* x, const T* weight, int64_t stride, int words, bool last_exists, int columns,
                    int64_t ahead, float* sum, int64_t pitch) {
  constexpr int L = Vec::kLanes, D = Operand<T>::kDepth;
  Vec s[kRows][kVecs];
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < kVecs; ++v) s[m][v] = Vec::load(sum + m * pitch + v * L);
  for (int k = 0; k < words; ++k) {
    const T* p = weight + k * D * stride;
    bool exists = k + 1 < words || last_exists;
    const T* q = next_row(p, stride, exists);
    for (int d = 0; d < D; ++d)
      for (int64_t offset = 0; offset < int64_t(kVecs * L * sizeof(T)); offset += 64)
        prefetch_l2((const char*)(p + d * stride) + ahead + offset);
    Vec w[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      const T* high = exists ? q + v * L : q;
      w[v] = kTail ? Operand<T>::across(p + v * L, high, columns) : Operand<T>::across(p + v * L, high);
    }
    for (int m = 0; m < kRows; ++m) {
      Vec a = Vec::broadcast(x[k * packed_stride(kRows) + m]);
      for (int v = 0; v < kVecs; ++v) s[m][v] = Operand<T>::step(a, w[v], s[m][v]);
    }
  }
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < kVecs; ++v) s[m][v].store(sum + m * pitch + v * L);
}

// total (kRows, columns) = x (words from pack_x) @ weight (K, columns). Rows of total are `pitch` apart. sum is scratch
// memory as large as total.
template <class T, int kRows>
inline void skinny(const float* x, const T* weight, int64_t stride, int64_t K, int64_t columns, float* total,
                   float* sum, int64_t pitch) {
  constexpr int L = Vec::kLanes, D = Operand<T>::kDepth;
  constexpr int kGroupsAhead = kRows > 1 ? 2 : 1;  // fetched before their use; with 1, 8 rows took a tenth longer
  constexpr int kVecs = (Vec::kRegisters - 4) / (kRows + 1) > 4 ? 4 : (Vec::kRegisters - 4) / (kRows + 1);
  int64_t words = ceil_div(K, D), ahead = kGroupsAhead * kGroupWords * D * stride * int64_t(sizeof(T));
  for (int64_t block = 0; block < words; block += kBlockWords) {
    int64_t block_end = min64(words, block + kBlockWords);
    for (int64_t i = 0; i < kRows * pitch; i += L) Vec::zero().store(sum + i);
    for (int64_t k = block; k < block_end; k += kGroupWords) {
      int group = int(min64(kGroupWords, block_end - k));
      bool last_exists = (k + group) * D <= K;
      const T* w = weight + k * D * stride;
      const float* a = x + k * packed_stride(kRows);
      int64_t n = 0;
      if (group == kGroupWords)
        for (; n + kVecs * L <= columns; n += kVecs * L)
          advance<T, kRows, kVecs, false>(a, w + n, stride, kGroupWords, last_exists, 0, ahead, sum + n, pitch);
      for (; n + L <= columns; n += L)
        advance<T, kRows, 1, false>(a, w + n, stride, group, last_exists, 0, ahead, sum + n, pitch);
      if (n < columns)
        advance<T, kRows, 1, true>(a, w + n, stride, group, last_exists, int(columns - n), ahead, sum + n, pitch);
    }
    for (int64_t i = 0; i < kRows * pitch; i += L) {
      Vec s = Vec::load(sum + i);
      if (block) s = Vec::load(total + i) + s;
      s.store(total + i);
    }
  }
}

}  // namespace
}  // namespace gpt2fast
