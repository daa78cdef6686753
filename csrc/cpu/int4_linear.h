// linear with a packed weight of 4 bits. A group of 32 inputs is 4 x 64 bytes [16 outputs][4 inputs], whose low halves
// are the words 0, 2, 4, 6 and whose high halves are the words 1, 3, 5, 7. Then follow 16 bfloat16, the scales of the
// outputs in this group. The value of a half is (half - 8) scale. See packed_linear.h.
#pragma once
#include "packed_linear.h"

namespace gpt2fast {
namespace {

struct Int4Weight {
  static constexpr int kGroupBytes = int(kInt4GroupBytes);
  static constexpr int kHalvesBytes = kGroupBytes - 2 * int(kPackedOutputs);
  static constexpr int kZero = 8;                          // the half byte of the value 0
  static constexpr int64_t kOffsetInputs = kPackedInputs;  // inputs whose bytes are summed up for one offset

  // total (kRows, kBlocks * 16) = rows of x^ @ blocks of weight, which are `block_bytes` apart.
  template <int kRows, int kBlocks>
  static inline void multiply(const RoundedRows& x, const uint8_t* weight, int64_t block_bytes, int64_t groups,
                              float* total, int64_t pitch) {
    constexpr int L = Vec::kLanes, kVecs = kBlocks * kBlockVecs, kChains = chains(kRows * kVecs) > 1 ? 2 : 1;
    Vec sums[kRows][kVecs];
    for (int m = 0; m < kRows; ++m)
      for (int v = 0; v < kVecs; ++v) sums[m][v] = Vec::zero();
    const int32_t *words = x.words, *offsets = x.offsets;
    const float* steps = x.steps;
    for (int64_t g = 0; g < groups; steps += kRows) {
      int64_t end = min64(g + kPiece / kPackedInputs, groups);
      Vec piece[kRows][kVecs];
      for (int m = 0; m < kRows; ++m)
        for (int v = 0; v < kVecs; ++v) piece[m][v] = Vec::zero();
      for (; g < end; ++g, words += kWordsInGroup * kRows, offsets += kRows) {
        const uint8_t* p = weight + g * kGroupBytes;
        for (int b = 0; b < kBlocks; ++b)
          for (int at = 0; at < kGroupBytes; at += 64) prefetch(p + b * block_bytes + kAheadBytes + at);
        Ints part[kChains][kRows][kVecs];
        for (int c = 0; c < kChains; ++c)
          for (int m = 0; m < kRows; ++m)
            for (int v = 0; v < kVecs; ++v) part[c][m][v] = Ints::broadcast(c == 0 ? offsets[m] : 0);
#pragma GCC unroll 4
        for (int word = 0; word < kWordsInGroup; word += 2) {
          UnsignedBytes low[kVecs], high[kVecs];
          for (int v = 0; v < kVecs; ++v) {
            auto w = UnsignedBytes::load(p + v / kBlockVecs * block_bytes + word * 32 + v % kBlockVecs * 4 * L);
            low[v] = w.low_halves(), high[v] = w.high_halves();
          }
          for (int m = 0; m < kRows; ++m) {
            SignedBytes q = SignedBytes::broadcast(words[word * kRows + m]);
            SignedBytes next = SignedBytes::broadcast(words[(word + 1) * kRows + m]);
            for (int v = 0; v < kVecs; ++v) {
              part[0][m][v] = dot(low[v], q, part[0][m][v]);
              part[kChains - 1][m][v] = dot(high[v], next, part[kChains - 1][m][v]);
            }
          }
        }
        for (int v = 0; v < kVecs; ++v) {
          const uint8_t* at = p + v / kBlockVecs * block_bytes + kHalvesBytes + v % kBlockVecs * 2 * L;
          Vec scale = Vec::load((const bfloat16*)at);
          for (int m = 0; m < kRows; ++m) piece[m][v] = fma(sum_of(part, m, v).as_float(), scale, piece[m][v]);
        }
      }
      for (int m = 0; m < kRows; ++m)
        for (int v = 0; v < kVecs; ++v) sums[m][v] = fma(piece[m][v], Vec::broadcast(steps[m]), sums[m][v]);
    }
    for (int m = 0; m < kRows; ++m)
      for (int v = 0; v < kVecs; ++v) sums[m][v].store(total + m * pitch + v * L);
  }
};

inline int64_t int4_linear_tasks(const PackedLinearArgs& a) { return packed_linear_tasks(a); }
inline void int4_linear_run(const PackedLinearArgs& a, int64_t begin, int64_t end) {
  packed_linear_run<Int4Weight>(a, begin, end);
}

}  // namespace
}  // namespace gpt2fast
