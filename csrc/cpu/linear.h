// y = activation(x @ W + bias) + residual. The order in which an output is summed does not depend on M, the number of
// rows: a row has the same bits in every batch.
//
// There are three kernels. docs/how/linear.md has their floors: reading the weight once for few rows, 2 M N K
// operations for many.
// - weight (N, K): linear_dot.h.
// - weight (K, N) and up to kSkinnyRows rows: linear_skinny.h.
// - weight (K, N) and more rows: this file, in the blocks of GotoBLAS (Goto and van de Geijn, 2008). A task is 128 rows
//   by 96 columns. Neighbouring tasks are merged into large blocks, so that they share the packed x, and a packed panel
//   of weight that stays in the L2 cache.
// For a weight (K, N), an output is summed in chains of kBlockWords fused steps along k, and the chains are added up.
#pragma once
#include "activation.h"
#include "linear_dot.h"
#include "linear_skinny.h"

namespace gpt2fast {
namespace {

constexpr int kTileRows = Vec::kRegisters == 16 ? 6 : Vec::kLanes == 16 ? 14 : 8;
constexpr int kTileVecs = Vec::kRegisters == 32 && Vec::kLanes == 4 ? 3 : 2;
constexpr int64_t kTileColumns = kTileVecs * Vec::kLanes;
constexpr int64_t kStepsOfFetch = 16;  // steps of a tile between two calls of Ahead
constexpr int64_t kSkinnyColumns = 64, kTaskColumns = 96, kTaskRows = 128;
constexpr int64_t kSkinnySums = 4096;                // sums of one pass over weight; they stay in the L1
constexpr int64_t kPanelColumns = 3 * kTaskColumns;  // a panel of kBlockWords x 288 words stays in the L2
constexpr int64_t kBlockRows = 512;                  // up to so many rows use a panel that is packed once
constexpr int64_t kPackedWords = 1 << 21;            // x stays packed from panel to panel up to so many words

// The inner loop: total (kRows, kTileVecs vectors) = x (words from pack_x) @ weight (words [k][kTileColumns]), or += if
// not `first`. The sums of the tile are in registers: inlined, the largest tile would lack some and take twice as long.
template <class T, int kRows>
__attribute__((noinline)) void tile(const float* x, const float* weight, int64_t words, float* total, int64_t pitch,
                                    bool first, Ahead& ahead) {
  constexpr int L = Vec::kLanes;
  Vec s[kRows][kTileVecs];
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < kTileVecs; ++v) s[m][v] = Vec::zero();
  for (int64_t k = 0; k < words; k += kStepsOfFetch) {
    int64_t steps = min64(kStepsOfFetch, words - k);
    ahead.steps(steps);
    for (int64_t i = 0; i < steps; ++i, x += packed_stride(kRows), weight += kTileColumns) {
      Vec w[kTileVecs];
      for (int v = 0; v < kTileVecs; ++v) w[v] = Vec::load(weight + v * L);
      for (int m = 0; m < kRows; ++m) {
        Vec a = Vec::broadcast(x[m]);
        for (int v = 0; v < kTileVecs; ++v) s[m][v] = Operand<T>::step(a, w[v], s[m][v]);
      }
    }
  }
  for (int m = 0; m < kRows; ++m)
    for (int v = 0; v < kTileVecs; ++v) {
      float* to = total + m * pitch + v * L;
      if (!first) s[m][v] = Vec::load(to) + s[m][v];
      s[m][v].store(to);
    }
}

template <class T, int kRows = kTileRows>
inline void tile_of(int rows, const float* x, const float* weight, int64_t words, float* total, int64_t pitch,
                    bool first, Ahead& ahead) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_of<T, kRows - 1>(rows, x, weight, words, total, pitch, first, ahead);
  }
  tile<T, kRows>(x, weight, words, total, pitch, first, ahead);
}

template <class T, Activation kActivation>
inline void finish_row(const LinearArgs& a, const float* total, int64_t m, int64_t n, int64_t columns) {
  constexpr int L = Vec::kLanes;
  const T* bias = a.bias ? (const T*)a.bias + n : nullptr;
  const T* residual = a.residual ? (const T*)a.residual + m * a.stride_residual_m + n : nullptr;
  T* preactivation = a.preactivation ? (T*)a.preactivation + m * a.N + n : nullptr;
  T* y = (T*)a.y + m * a.N + n;
  int64_t j = 0;
  for (; j + L <= columns; j += L) {
    Vec s = Vec::load(total + j);
    if (bias) s = s + Vec::load(bias + j);
    if (preactivation) s.store(preactivation + j);
    s = activate<kActivation, T>(s);
    if (residual) s = s + Vec::load(residual + j);
    s.store(y + j);
  }
  if (j < columns) {
    int rest = int(columns - j);
    Vec s = Vec::load(total + j, rest);
    if (bias) s = s + Vec::load(bias + j, rest);
    if (preactivation) s.store(preactivation + j, rest);
    s = activate<kActivation, T>(s);
    if (residual) s = s + Vec::load(residual + j, rest);
    s.store(y + j, rest);
  }
}

// Writes outputs (m .. m + rows, n .. n + columns), from their sums.
template <class T>
inline void finish(const LinearArgs& a, const float* total, int64_t pitch, int64_t m, int64_t rows, int64_t n,
                   int64_t columns) {
  with_activation(a.activation, [&](auto tag) {
    for (int64_t i = 0; i < rows; ++i) finish_row<T, decltype(tag)::value>(a, total + i * pitch, m + i, n, columns);
  });
}

// Computes outputs (first_m .. last_m, first_n .. last_n) where weight is (N, K).
template <class T>
inline void linear_dots(const LinearArgs& a, int64_t first_m, int64_t last_m, int64_t first_n, int64_t last_n) {
  int64_t blocks = ceil_div(last_m - first_m, kDotBlockRows);
  for (int64_t block = 0; block < blocks; ++block) {
    int64_t m = first_m + (last_m - first_m) * block / blocks;
    int64_t rows = first_m + (last_m - first_m) * (block + 1) / blocks - m;
    dot_panels(
        (const T*)a.x + m * a.stride_x_m, a.stride_x_m, rows, (const T*)a.weight, a.stride_weight, a.K, first_n, last_n,
        [&](int64_t n, int64_t columns, const float* total) { finish<T>(a, total, kDotPitch, m, rows, n, columns); });
  }
}

// Tasks [begin, end) of a call with at most kSkinnyRows rows; a task is kSkinnyColumns columns.
template <class T, int kRows = kSkinnyRows>
inline void linear_skinny(const LinearArgs& a, int64_t begin, int64_t end) {
  if constexpr (kRows > 1) {
    if (a.M < kRows) return linear_skinny<T, kRows - 1>(a, begin, end);
  }
  int64_t first = begin * kSkinnyColumns, last = min64(a.N, end * kSkinnyColumns);
  if (a.transposed) return linear_dots<T>(a, 0, a.M, first, last);
  int64_t passes = max64(1, ceil_div(last - first, kSkinnySums / kRows));
  int64_t width = ceil_div(ceil_div(last - first, passes), kSkinnyColumns) * kSkinnyColumns;
  int64_t pitch = width + Vec::kLanes;  // a power of two would put all rows into the same sets of the L1
  float* x = (float*)scratch<0>(size_t(a.K * packed_stride(kRows) + Vec::kLanes) * sizeof(float));
  float* total = (float*)scratch<1>(size_t(2 * kRows * pitch) * sizeof(float));
  pack_x((const T*)a.x, a.stride_x_m, kRows, a.K, x);
  for (int64_t n = first; n < last; n += width) {
    int64_t columns = min64(width, last - n);
    if (a.K == 0) __builtin_memset(total, 0, size_t(kRows * pitch) * sizeof(float));
    skinny<T, kRows>(x, (const T*)a.weight + n, a.stride_weight, a.K, columns, total, total + kRows * pitch, pitch);
    finish<T>(a, total, pitch, 0, kRows, n, columns);
  }
}

// Cuts a block of rows into tiles as equal as possible, and calls f(first row, rows) for each.
template <class F>
inline void for_tiles(int64_t rows, F&& f) {
  int64_t tiles = ceil_div(rows, kTileRows);
  for (int64_t i = 0; i < tiles; ++i) f(rows * i / tiles, int(rows * (i + 1) / tiles - rows * i / tiles));
}

template <class T>
inline void pack_block(const T* x, int64_t stride, int64_t rows, int64_t elements, float* out) {
  int64_t words = ceil_div(elements, Operand<T>::kDepth);
  for_tiles(rows, [&](int64_t m, int count) {
    pack_x(x + m * stride, stride, count, elements, out);
    out += words * packed_stride(count);
  });
}

// total (rows, columns) = x (tiles from pack_block) @ weight (panels from pack_weight), or += if not `first`.
template <class T>
inline void multiply_block(const float* x, const float* weight, int64_t rows, int64_t columns, int64_t words,
                           float* total, int64_t pitch, bool first, Ahead ahead) {
  for_tiles(rows, [&](int64_t m, int count) {
    for (int64_t n = 0; n < columns; n += kTileColumns)
      tile_of<T>(count, x, weight + n * words, words, total + m * pitch + n, pitch, first, ahead);
    x += words * packed_stride(count);
  });
}

// Fetches the panel of weight that linear_block packs after that of words k and columns n, while a block of so many
// rows and columns is multiplied. Nothing is fetched after the last panel.
template <class T>
inline Ahead next_panel(const LinearArgs& a, int64_t k, int64_t n, int64_t first_n, int64_t last_n, bool last_block,
                        int64_t rows, int64_t columns) {
  constexpr int64_t D = Operand<T>::kDepth;
  int64_t words = ceil_div(a.K, D);
  int64_t steps = ceil_div(rows, kTileRows) * ceil_div(columns, kTileColumns) * min64(kBlockWords, words - k);
  if ((k += kBlockWords) >= words) k = 0, n += kPanelColumns;
  if (n >= last_n && !last_block) n = first_n;
  if (n >= last_n) return {};
  return Ahead((const T*)a.weight + k * D * a.stride_weight + n, a.stride_weight, min64(kBlockWords * D, a.K - k * D),
               min64(kPanelColumns, last_n - n), steps);
}

// Computes outputs (first_m .. last_m, first_n .. last_n).
template <class T>
inline void linear_block(const LinearArgs& a, int64_t first_m, int64_t last_m, int64_t first_n, int64_t last_n) {
  if (a.transposed) return linear_dots<T>(a, first_m, last_m, first_n, last_n);
  constexpr int64_t D = Operand<T>::kDepth, kPitch = kPanelColumns;
  int64_t words = ceil_div(a.K, D), blocks = ceil_div(last_m - first_m, kBlockRows);
  int64_t most_rows = ceil_div(last_m - first_m, blocks);
  int64_t padded_rows = ceil_div(most_rows, kTileRows) * packed_stride(kTileRows);
  bool keeps_x = padded_rows * words <= kPackedWords;
  int64_t x_words = padded_rows * (keeps_x ? words : kBlockWords) + Vec::kLanes;
  float* packed_x = (float*)scratch<0>(size_t(x_words) * sizeof(float));
  float* packed_weight = (float*)scratch<1>(size_t(kBlockWords * kPitch) * sizeof(float));
  float* total = (float*)scratch<2>(size_t(most_rows * kPitch) * sizeof(float));
  for (int64_t block = 0; block < blocks; ++block) {
    int64_t m = first_m + (last_m - first_m) * block / blocks;
    int64_t rows = first_m + (last_m - first_m) * (block + 1) / blocks - m;
    for (int64_t n = first_n; n < last_n; n += kPanelColumns) {
      int64_t columns = min64(kPanelColumns, last_n - n);
      if (words == 0) __builtin_memset(total, 0, size_t(rows * kPitch) * sizeof(float));
      for (int64_t k = 0; k < words; k += kBlockWords) {
        int64_t count = min64(kBlockWords, words - k), elements = min64(count * D, a.K - k * D);
        float* x = packed_x + (keeps_x ? k * padded_rows : 0);
        if (n == first_n || !keeps_x)
          pack_block((const T*)a.x + m * a.stride_x_m + k * D, a.stride_x_m, rows, elements, x);
        const T* weight = (const T*)a.weight + k * D * a.stride_weight + n;
        bool first = block == 0 && n == first_n && k == 0;
        pack_weight<T, kTileVecs>(weight, a.stride_weight, elements, columns, packed_weight, !first);
        Ahead ahead = next_panel<T>(a, k, n, first_n, last_n, block + 1 == blocks, rows, columns);
        multiply_block<T>(x, packed_weight, rows, columns, count, total, kPitch, k == 0, ahead);
      }
      finish<T>(a, total, kPitch, m, rows, n, columns);
    }
  }
}

// Task = chunk of columns * row_chunks + chunk of rows. A range of tasks is merged into a few large blocks.
template <class T>
inline void linear_blocked(const LinearArgs& a, int64_t begin, int64_t end) {
  int64_t row_chunks = ceil_div(a.M, kTaskRows);
  while (begin < end) {
    int64_t n = begin / row_chunks, chunk = begin % row_chunks, columns = 1,
            chunks = min64(row_chunks - chunk, end - begin);
    if (chunks == row_chunks) columns = (end - begin) / row_chunks;
    linear_block<T>(a, a.M * chunk / row_chunks, a.M * (chunk + chunks) / row_chunks, n * kTaskColumns,
                    min64(a.N, (n + columns) * kTaskColumns));
    begin += chunks * columns;
  }
}

inline int64_t linear_tasks(const LinearArgs& a) {
  if (a.M == 0 || a.N == 0) return 0;
  return a.M <= kSkinnyRows ? ceil_div(a.N, kSkinnyColumns) : ceil_div(a.M, kTaskRows) * ceil_div(a.N, kTaskColumns);
}

inline void linear_run(const LinearArgs& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    a.M <= kSkinnyRows ? linear_skinny<T>(a, begin, end) : linear_blocked<T>(a, begin, end);
  });
}

}  // namespace
}  // namespace gpt2fast
