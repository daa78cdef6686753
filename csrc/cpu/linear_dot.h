// linear with weight (N, K), for any number of rows. The rows of both operands lie along k. So the lanes of a vector
// hold neighbours along k, and weight is used where it lies. For each kDotWords words of k, an output is summed in
// kLanes chains of fused steps, and a tree adds up the lanes. These partial sums are added up in order of k.
#pragma once
#include "linear_pack.h"

namespace gpt2fast {
namespace {

// The rows x columns sums of a tile, a vector of each of its rows of x and one of weight fit in the registers.
constexpr int kDotRows = Vec::kRegisters == 32 ? 4 : 3;
constexpr int kDotColumns = Vec::kRegisters == 32 ? 6 : 4;
constexpr int64_t kDotWords = 1024;     // so long pieces of kDotRows of x and kDotColumns of weight stay in the L1
constexpr int64_t kDotBlockRows = 192;  // so many rows of x stay in the L2 from column to column
constexpr int kSumsInStep = 8;          // vectors that one call of lane_sums adds up
constexpr int64_t kDotPanel = 12 * kDotColumns, kDotPitch = kDotPanel + 16;  // columns of sums that wait for finish

// total (kRows, kColumns) = x (words, rows `stride_x` apart) times rows of weight, or += if not `first`.
template <class T, int kRows, int kColumns>
inline void dot_tile(const float* x, int64_t stride_x, const T* weight, int64_t stride, int64_t elements, float* total,
                     bool first) {
  constexpr int L = Vec::kLanes, W = L * Operand<T>::kDepth;
  Vec s[kRows][kColumns];
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < kColumns; ++n) s[m][n] = Vec::zero();
  int64_t k = 0;
  for (; k + W <= elements; k += W, x += L) {
    Vec a[kRows];
    for (int m = 0; m < kRows; ++m) a[m] = Vec::load(x + m * stride_x);
    for (int n = 0; n < kColumns; ++n) {
      Vec w = Operand<T>::along(weight + n * stride + k);
      if (kRows > 1) prefetch(weight + (n + kColumns) * stride + k);  // one row has too little work to hide its cost
      for (int m = 0; m < kRows; ++m) s[m][n] = Operand<T>::step(a[m], w, s[m][n]);
    }
  }
  if (k < elements) {
    for (int n = 0; n < kColumns; ++n) {
      Vec w = Operand<T>::along(weight + n * stride + k, int(elements - k));
      for (int m = 0; m < kRows; ++m) s[m][n] = Operand<T>::step(Vec::load(x + m * stride_x), w, s[m][n]);
    }
  }
  float sums[kRows * kColumns + kSumsInStep];
  for (int i = 0; i < kRows * kColumns; i += kSumsInStep) {
    Vec part[kSumsInStep];
    for (int j = 0; j < kSumsInStep; ++j) {
      int at = i + j < kRows * kColumns ? i + j : i;
      part[j] = s[at / kColumns][at % kColumns];
    }
    lane_sums(part, sums + i);
  }
  for (int m = 0; m < kRows; ++m) {
    Vec sum = Vec::load(sums + m * kColumns, kColumns);
    if (!first) sum = Vec::load(total + m * kDotPitch, kColumns) + sum;
    sum.store(total + m * kDotPitch, kColumns);
  }
}

// The same for any rows up to kDotRows and columns up to kDotColumns.
template <class T, int kRows = kDotRows>
inline void dot_tile_of(int64_t rows, const float* x, int64_t stride_x, const T* weight, int64_t stride,
                        int64_t elements, int64_t columns, float* total, bool first) {
  if constexpr (kRows > 1) {
    if (rows < kRows)
      return dot_tile_of<T, kRows - 1>(rows, x, stride_x, weight, stride, elements, columns, total, first);
  }
  if (columns == kDotColumns)
    return dot_tile<T, kRows, kDotColumns>(x, stride_x, weight, stride, elements, total, first);
  for (int64_t n = 0; n < columns; ++n)
    dot_tile<T, kRows, 1>(x, stride_x, weight + n * stride, stride, elements, total + n, first);
}

// Multiplies rows of x by rows [first_n, last_n) of weight, panel by panel, and calls f(n, columns, total) for each.
template <class T, class F>
inline void dot_panels(const T* x, int64_t stride_x, int64_t rows, const T* weight, int64_t stride, int64_t K,
                       int64_t first_n, int64_t last_n, F&& f) {
  constexpr int64_t L = Vec::kLanes, D = Operand<T>::kDepth;
  int64_t words = ceil_div(ceil_div(K, D), L) * L;
  float* packed = (float*)scratch<0>(size_t(rows * words + L) * sizeof(float));
  float* total = (float*)scratch<1>(size_t(rows * kDotPitch) * sizeof(float));
  for (int64_t m = 0; m < rows; ++m) pack_x(x + m * stride_x, 0, 1, K, packed + m * words);
  if (K == 0) __builtin_memset(total, 0, size_t(rows * kDotPitch) * sizeof(float));
  for (int64_t n = first_n; n < last_n; n += kDotPanel) {
    int64_t columns = min64(kDotPanel, last_n - n);
    for (int64_t k = 0; k < K; k += kDotWords * D)
      for (int64_t j = 0; j < columns; j += kDotColumns)
        for (int64_t m = 0; m < rows; m += kDotRows)
          dot_tile_of<T>(min64(kDotRows, rows - m), packed + m * words + k / D, words, weight + (n + j) * stride + k,
                         stride, min64(K - k, kDotWords * D), min64(kDotColumns, columns - j),
                         total + m * kDotPitch + j, k == 0);
    f(n, columns, total);
  }
}

}  // namespace
}  // namespace gpt2fast
