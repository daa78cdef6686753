// What int8_linear and int4_linear share: y = activation(x^ @ W + bias) + residual, where x^ is x rounded to 8 bits and
// W is packed. Reading the weight once is the floor for few rows, 2 M N K integer operations for many.
//
// A packed weight consists of blocks of 16 outputs, a block of groups of 32 inputs, and a group of 8 words. A word has
// 4 inputs of each of the 16 outputs, one byte or half a byte each. So a weight is read from start to end.
//
// Each row of x is rounded in pieces of kPiece inputs: x^ = step q with integers |q| <= 127 and step = max |x| / 127.
// The products of integers and their sums are exact, and the floats made of them are added up in order of k. So a row
// has the same bits in every batch.
#pragma once
#include "linear.h"

namespace gpt2fast {
namespace {

constexpr int64_t kPiece = 128;   // inputs of a row of x that have one step
constexpr int kWordsInGroup = 8;  // words of 4 inputs
constexpr int kBlockVecs = int(kPackedOutputs) / Vec::kLanes;
constexpr int kPackedRows = Vec::kLanes == 16 ? 14 : 4;    // rows of a tile
constexpr int kFewPackedRows = Vec::kLanes == 16 ? 8 : 4;  // up to so many rows, a tile has one block, otherwise two
constexpr int64_t kPackedTaskRows = 8 * kPackedRows, kPackedTaskBlocks = 4;
constexpr float kTiny = 0x1p-100f;
constexpr int kAheadBytes = 2048;  // how far ahead of its use weight is fetched

// How many sets of sums take turns, word by word, where a tile has so many sums: a single sum would wait for the one
// before it.
constexpr int chains(int sums) { return sums < 4 ? 4 : sums < 8 ? 2 : 1; }

template <int kChains, int kRows, int kVecs>
GPT2FAST_INLINE Ints sum_of(const Ints (&part)[kChains][kRows][kVecs], int m, int v) {
  Ints sum = part[0][m][v];
  for (int c = 1; c < kChains; ++c) sum = sum + part[c][m][v];
  return sum;
}

// A row of x rounded to bytes. A piece without a magnitude of kTiny counts as zeros, so that 127 / max |x| is finite. A
// NaN or an infinity in a piece makes its step NaN. Up to kLanes - 1 bytes past K are written.
template <class T>
inline void round_row(const T* x, int64_t K, int8_t* bytes, float* steps) {
  constexpr int L = Vec::kLanes;
  for (int64_t first = 0; first < K; first += kPiece, ++steps) {
    int64_t count = min64(kPiece, K - first), k = 0;
    Vec largest = Vec::zero(), spoilt = Vec::zero();
    auto see = [&](Vec v) {
      largest = max(abs(v), largest);
      spoilt = fma(v, Vec::zero(), spoilt);  // 0, or NaN
    };
    for (; k + L <= count; k += L) see(Vec::load(x + first + k));
    if (k < count) see(Vec::load(x + first + k, int(count - k)));
    float most = reduce_max(largest);
    *steps = most / 127.f + reduce_add(spoilt);
    Vec scale = Vec::broadcast(*steps == *steps && most >= kTiny ? 127.f / most : 0.f);
    Vec bound = Vec::broadcast(127.f);
    auto rounded = [&](Vec v) { return min(max(round(v * scale), Vec::zero() - bound), bound); };
    for (k = 0; k + L <= count; k += L) rounded(Vec::load(x + first + k)).store_bytes(bytes + first + k);
    if (k < count) rounded(Vec::load(x + first + k, int(count - k))).store_bytes(bytes + first + k);
  }
}

// Rows of x as a tile reads them: words [word][row], steps [piece][row], and offsets [part][row]: the sum of the bytes
// of a part, a piece or a group, times minus the zero of the weights.
struct RoundedRows {
  int32_t *words, *offsets;
  float* steps;
};

template <class Weight, class T>
inline void round_rows(const T* x, int64_t stride, int rows, int64_t K, const RoundedRows& out) {
  int64_t groups = ceil_div(K, kPackedInputs), pieces = ceil_div(K, kPiece);
  int8_t* bytes = (int8_t*)scratch<0>(size_t(groups * kPackedInputs + 64) + size_t(pieces) * sizeof(float));
  float* steps = (float*)(bytes + groups * kPackedInputs + 64);
  for (int i = 0; i < rows; ++i) {
    round_row(x + i * stride, K, bytes, steps);
    for (int64_t k = K; k < groups * kPackedInputs; ++k) bytes[k] = 0;
    for (int64_t w = 0; w < groups * kWordsInGroup; ++w) __builtin_memcpy(out.words + w * rows + i, bytes + 4 * w, 4);
    for (int64_t p = 0; p < pieces; ++p) out.steps[p * rows + i] = steps[p];
    for (int64_t first = 0, part = 0; first < groups * kPackedInputs; first += Weight::kOffsetInputs, ++part) {
      int64_t count = min64(Weight::kOffsetInputs, groups * kPackedInputs - first);
      int32_t sum = 0;
      for (int64_t k = 0; k < count; ++k) sum += bytes[first + k];
      out.offsets[part * rows + i] = -Weight::kZero * sum;
    }
  }
}

// Computes a number of rows that is known at run time, over blocks [first, last) of outputs. Weight is an Int8Weight or
// an Int4Weight: it says how a tile multiplies.
template <class T, class Weight, int kRows>
inline void packed_rows(const PackedLinearArgs& a, const LinearArgs& outputs, const RoundedRows& x, int rows, int64_t m,
                        int64_t first, int64_t last) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return packed_rows<T, Weight, kRows - 1>(a, outputs, x, rows, m, first, last);
  }
  constexpr int64_t N = kPackedOutputs, kPitch = 2 * N;
  int64_t groups = ceil_div(a.K, kPackedInputs), block_bytes = groups * Weight::kGroupBytes;
  float total[kRows * kPitch];
  for (int64_t b = first; b < last;) {
    int count = kRows > kFewPackedRows && b + 2 <= last ? 2 : 1;
    const uint8_t* weight = a.weight + b * block_bytes;
    if (count == 2) {
      if constexpr (kRows > kFewPackedRows)
        Weight::template multiply<kRows, 2>(x, weight, block_bytes, groups, total, kPitch);
    } else {
      Weight::template multiply<kRows, 1>(x, weight, block_bytes, groups, total, kPitch);
    }
    int64_t n = b * N, columns = min64(a.N - n, count * N);
    if (a.scale) {
      float scale[kPitch] = {};
      __builtin_memcpy(scale, a.scale + n, size_t(columns) * sizeof(float));
      for (int i = 0; i < kRows; ++i)
        for (int v = 0; v < count * N; v += Vec::kLanes)
          (Vec::load(total + i * kPitch + v) * Vec::load(scale + v)).store(total + i * kPitch + v);
    }
    finish<T>(outputs, total, kPitch, m, kRows, n, columns);
    b += count;
  }
}

inline int64_t packed_row_tasks(const PackedLinearArgs& a) { return ceil_div(a.M, kPackedTaskRows); }
inline int64_t packed_block_tasks(const PackedLinearArgs& a) {
  return ceil_div(ceil_div(a.N, kPackedOutputs), kPackedTaskBlocks);
}

// Task = part of the rows * packed_block_tasks + part of the outputs.
inline int64_t packed_linear_tasks(const PackedLinearArgs& a) { return packed_row_tasks(a) * packed_block_tasks(a); }

template <class T, class Weight>
inline void packed_linear(const PackedLinearArgs& a, int64_t begin, int64_t end) {
  int64_t row_tasks = packed_row_tasks(a), block_tasks = packed_block_tasks(a);
  int64_t groups = ceil_div(a.K, kPackedInputs), pieces = ceil_div(a.K, kPiece);
  LinearArgs outputs{.x = nullptr,
                     .weight = nullptr,
                     .bias = a.bias,
                     .residual = a.residual,
                     .y = a.y,
                     .preactivation = nullptr,
                     .M = a.M,
                     .K = a.K,
                     .N = a.N,
                     .stride_x_m = 0,
                     .stride_weight = 0,
                     .stride_residual_m = a.stride_residual_m,
                     .transposed = false,
                     .activation = a.activation,
                     .dtype = a.dtype};
  size_t words = size_t(groups * kWordsInGroup), row_bytes = (words + size_t(groups + pieces)) * 4;
  for (int64_t task = begin; task < end;) {
    int64_t part = task / block_tasks, next = min64((part + 1) * block_tasks, end);
    int64_t m = a.M * part / row_tasks, rows = a.M * (part + 1) / row_tasks - m;
    int64_t first = (task - part * block_tasks) * kPackedTaskBlocks;
    int64_t last = min64((next - part * block_tasks) * kPackedTaskBlocks, ceil_div(a.N, kPackedOutputs));
    int64_t tiles = ceil_div(rows, kPackedRows);
    char* memory = (char*)scratch<1>(size_t(rows) * row_bytes);
    RoundedRows x[kPackedTaskRows / kPackedRows];
    for (int64_t i = 0; i < tiles; ++i) {
      int64_t from = rows * i / tiles, count = rows * (i + 1) / tiles - from;
      x[i].words = (int32_t*)(memory + size_t(from) * row_bytes);
      x[i].offsets = x[i].words + words * size_t(count);
      x[i].steps = (float*)(x[i].offsets + groups * count);
      round_rows<Weight>((const T*)a.x + (m + from) * a.stride_x_m, a.stride_x_m, int(count), a.K, x[i]);
    }
    // A few blocks at a time, so that they stay in the L2 cache from tile to tile.
    int64_t step = tiles == 1 ? last - first : kPackedTaskBlocks;
    for (int64_t b = first; b < last; b += step)
      for (int64_t i = 0; i < tiles; ++i) {
        int64_t from = rows * i / tiles, count = rows * (i + 1) / tiles - from;
        packed_rows<T, Weight, kPackedRows>(a, outputs, x[i], int(count), m + from, b, min64(b + step, last));
      }
    task = next;
  }
}

template <class Weight>
inline void packed_linear_run(const PackedLinearArgs& a, int64_t begin, int64_t end) {
  with_dtype(a.dtype, [&](auto tag) { packed_linear<typename decltype(tag)::type, Weight>(a, begin, end); });
}

}  // namespace
}  // namespace gpt2fast
