// linear with a packed weight of 8 bits: a word is 64 bytes [16 outputs][4 inputs], and the value of a byte is
// (byte - 128) scale[output]. See packed_linear.h.
#pragma once
#include "packed_linear.h"

namespace gpt2fast {
namespace {

struct Int8Weight {
  static constexpr int kGroupBytes = int(kInt8GroupBytes);
  static constexpr int kZero = 128;                 // the byte of the value 0
  static constexpr int64_t kOffsetInputs = kPiece;  // inputs whose bytes are summed up for one offset

  // total (kRows, kBlocks * 16) = rows of x^ @ (blocks of weight / scale). The blocks are `block_bytes` apart.
  template <int kRows, int kBlocks>
  static inline void multiply(const RoundedRows& x, const uint8_t* weight, int64_t block_bytes, int64_t groups,
                              float* total, int64_t pitch) {
    constexpr int L = Vec::kLanes, kVecs = kBlocks * kBlockVecs, kChains = chains(kRows * kVecs);
    Vec sums[kRows][kVecs];
    for (int m = 0; m < kRows; ++m)
      for (int v = 0; v < kVecs; ++v) sums[m][v] = Vec::zero();
    const int32_t *words = x.words, *offsets = x.offsets;
    const float* steps = x.steps;
    for (int64_t g = 0; g < groups; steps += kRows, offsets += kRows) {
      int64_t end = min64(g + kPiece / kPackedInputs, groups);
      Ints part[kChains][kRows][kVecs];
      for (int c = 0; c < kChains; ++c)
        for (int m = 0; m < kRows; ++m)
          for (int v = 0; v < kVecs; ++v) part[c][m][v] = Ints::broadcast(c == 0 ? offsets[m] : 0);
      for (; g < end; ++g, words += kWordsInGroup * kRows) {
        const uint8_t* p = weight + g * kGroupBytes;
        for (int b = 0; b < kBlocks; ++b)
          for (int at = 0; at < kGroupBytes; at += 64) prefetch(p + b * block_bytes + kAheadBytes + at);
#pragma GCC unroll 8
        for (int word = 0; word < kWordsInGroup; ++word) {
          UnsignedBytes w[kVecs];
          for (int v = 0; v < kVecs; ++v)
            w[v] = UnsignedBytes::load(p + v / kBlockVecs * block_bytes + word * 64 + v % kBlockVecs * 4 * L);
          for (int m = 0; m < kRows; ++m) {
            SignedBytes q = SignedBytes::broadcast(words[word * kRows + m]);
            for (int v = 0; v < kVecs; ++v) part[word % kChains][m][v] = dot(w[v], q, part[word % kChains][m][v]);
          }
        }
      }
      for (int m = 0; m < kRows; ++m)
        for (int v = 0; v < kVecs; ++v)
          sums[m][v] = fma(sum_of(part, m, v).as_float(), Vec::broadcast(steps[m]), sums[m][v]);
    }
    for (int m = 0; m < kRows; ++m)
      for (int v = 0; v < kVecs; ++v) sums[m][v].store(total + m * pitch + v * L);
  }
};

inline int64_t int8_linear_tasks(const PackedLinearArgs& a) { return packed_linear_tasks(a); }
inline void int8_linear_run(const PackedLinearArgs& a, int64_t begin, int64_t end) {
  packed_linear_run<Int8Weight>(a, begin, end);
}

}  // namespace
}  // namespace gpt2fast
