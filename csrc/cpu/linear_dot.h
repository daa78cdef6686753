// linear with weight (N, K), for any number of rows. The rows of both operands lie along k. So the lanes of a vector
// hold neighbours along k, and weight is used where it lies. For each kDotWords words of k, an output is summed in
// kLanes chains of fused steps, and a tree adds up the lanes. These partial sums are added up in order of k.
#pragma once
#include "linear_pack.h"

namespace gpt2fast {
namespace {

// The rows x columns sums of a tile are in registers, and so are a vector of each of its rows of x and one of weight.
// The largest tile has one sum more than fits. Up to kDotRows rows read weight once. For few rows, more columns give
// more sums that do not wait for each other.
constexpr int kDotRows = Vec::kRegisters == 32 ? 8 : 4, kDotColumns = 3;
constexpr int kFewDotRows = kDotRows / 2,
              kFewDotColumns = Vec::kLanes < 2 * kDotColumns ? Vec::kLanes : 2 * kDotColumns;
constexpr int64_t kDotWords = 1024;     // so long pieces of a tile's rows of x and weight stay in the L1
constexpr int64_t kDotBlockRows = 192;  // so many rows of x stay in the L2 from chunk to chunk
constexpr int64_t kDotChunk = 24;       // columns that all rows of x go over before the next ones; fetched ahead
constexpr int kSumsInStep = 8;          // vectors that one call of lane_sums adds up
constexpr int64_t kDotPanel = 3 * kDotChunk, kDotPitch = kDotPanel + 16;  // columns of sums that wait for finish

// total (kRows, kColumns) = x (words, rows `stride_x` apart) times rows of weight, or += if not `first`.
template <class T, int kRows, int kColumns>
inline void dot_tile(const float* x, int64_t stride_x, const T* weight, int64_t stride, int64_t elements, float* total,
                     bool first, Ahead& ahead) {
  constexpr int L = Vec::kLanes, W = L * Operand<T>::kDepth;
  Vec s[kRows][kColumns];
  for (int m = 0; m < kRows; ++m)
    for (int n = 0; n < kColumns; ++n) s[m][n] = Vec::zero();
  int64_t k = 0;
  for (; k + W <= elements; k += W, x += L) {
    Vec a[kRows];
    for (int m = 0; m < kRows; ++m) a[m] = Vec::load(x + m * stride_x);
    if (kRows > 1) ahead.steps(1);
    for (int n = 0; n < kColumns; ++n) {
      Vec w = Operand<T>::along(weight + n * stride + k);
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

// The same for any rows up to kRows and columns up to kColumns.
template <class T, int kRows, int kColumns>
inline void dot_tile_of(int64_t rows, const float* x, int64_t stride_x, const T* weight, int64_t stride,
                        int64_t elements, int64_t columns, float* total, bool first, Ahead& ahead) {
  if constexpr (kRows > 1) {
    if (rows < kRows)
      return dot_tile_of<T, kRows - 1, kColumns>(rows, x, stride_x, weight, stride, elements, columns, total, first,
                                                 ahead);
  }
  if (columns == kColumns)
    return dot_tile<T, kRows, kColumns>(x, stride_x, weight, stride, elements, total, first, ahead);
  for (int64_t n = 0; n < columns; ++n)
    dot_tile<T, kRows, 1>(x, stride_x, weight + n * stride, stride, elements, total + n, first, ahead);
}

// The same for a chunk of columns and any number of rows, in tiles. `next` columns of weight follow the chunk: they are
// fetched meanwhile, but not for one row, which has too little work to hide what that costs.
template <class T, int kRows, int kColumns>
inline void dot_chunk(int64_t rows, const float* x, int64_t stride_x, const T* weight, int64_t stride, int64_t elements,
                      int64_t columns, int64_t next, float* total, bool first) {
  // A tile of a single row fetches nothing.
  int64_t tiles = (rows / kRows + (rows % kRows > 1)) * ceil_div(columns, kColumns);
  Ahead ahead;
  if (rows > 1 && next > 0)
    ahead = Ahead(weight + columns * stride, stride, next, elements,
                  tiles * (elements / (Vec::kLanes * Operand<T>::kDepth)));
  for (int64_t m = 0; m < rows; m += kRows)
    for (int64_t n = 0; n < columns; n += kColumns)
      dot_tile_of<T, kRows, kColumns>(min64(kRows, rows - m), x + m * stride_x, stride_x, weight + n * stride, stride,
                                      elements, min64(kColumns, columns - n), total + m * kDotPitch + n, first, ahead);
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
      for (int64_t j = 0; j < columns; j += kDotChunk) {
        int64_t end = n + min64(columns, j + kDotChunk);
        auto chunk =
            rows <= kFewDotRows ? dot_chunk<T, kFewDotRows, kFewDotColumns> : dot_chunk<T, kDotRows, kDotColumns>;
        chunk(rows, packed + k / D, words, weight + (n + j) * stride + k, stride, min64(K - k, kDotWords * D),
              end - n - j, min64(kDotChunk, last_n - end), total + j, k == 0);
      }
    f(n, columns, total);
  }
}

}  // namespace
}  // namespace gpt2fast
