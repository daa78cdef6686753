// y = wte[token] + wpe[position] (+ wte[token_type]), summed in float32 and rounded once, and the tables' gradients.
//
// Forward: a warp has a row of y, or a part of its columns. A lane has the same columns of each table and starts all
// its loads before it adds. The floor is memory traffic: the rows of the tables that are named are read, and y is
// written once. docs/kernels.md counts 1.01 times that.
//
// Backward: the gradient of a table row is the sum of the rows of dy that it went into. The caller sorts the rows of dy
// by table row. One warp adds up the rows of dy of one table row, in their order. A token that occurs often is shared
// by several warps: each has one segment of the sorted rows, and a second kernel joins their parts. There are no
// atomics, so that the bits are the same in every run.
#include <type_traits>

#include "device.cuh"
#include "kernels.h"

namespace gpt2fast::cuda {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;  // of a block
constexpr int kForwardPacks = 4;                          // packs (or single elements) of a lane in the forward pass
constexpr int kRowsAtOnce = 8;                            // rows of dy that a warp loads together
constexpr int kPartsAtOnce = 8;                           // parts of other segments that a warp loads together
constexpr int64_t kMostAcross = 65535;                    // the most blocks along a grid's second dimension

// Packs of a lane in the backward pass. There are two if a pack is one element, since each warp reads the lists of rows
// again.
template <int kWidth>
constexpr int kBackwardPacks = kWidth == 1 ? 2 : 1;

// The columns of a warp whose lanes have kPacks packs each. Lane i has the packs i, i + 32, ..., so that neighbouring
// lanes read neighbouring bytes.
template <int kWidth, int kPacks>
constexpr int kColumns = kWarp * kWidth * kPacks;

// The number of this warp's row.
__device__ __forceinline__ int64_t row_of_warp() { return int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; }

// Whether a table of `rows` rows has this row.
__device__ __forceinline__ bool has(int64_t rows, int64_t row) { return 0 <= row && row < rows; }

// A pack as it is in memory. It is converted to float32 only after all loads have started. If a load has a condition,
// the compiler would put the conversion right behind it, and the next load would wait.
template <class T, int kWidth>
using Raw = std::conditional_t<kWidth == 1, T, uint4>;

template <class T, int kWidth>
__device__ __forceinline__ Raw<T, kWidth> load_raw(const T* from) {
  return *reinterpret_cast<const Raw<T, kWidth>*>(from);
}
template <class T, int kWidth>
__device__ __forceinline__ void add(const Raw<T, kWidth>& raw, float (&to)[kWidth]) {
  float wide[kWidth];
  load<T, kWidth>(reinterpret_cast<const T*>(&raw), wide);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) to[i] += wide[i];
}

// Warp (r, j) has the j-th part of the columns of row r of y. If a table does not have a row, y is NaN, since no check
// precedes the launch.
template <class T, int kWidth, bool kTypes>
__global__ void __launch_bounds__(kThreads) embedding_kernel(EmbeddingArgs a) {
  const int64_t r = row_of_warp();
  if (r >= a.B * a.T) return;
  const unsigned b = unsigned(r) / unsigned(a.T), t = unsigned(r) - b * unsigned(a.T);
  const int64_t token = a.tokens[r], type = kTypes ? a.token_types[r] : 0;
  const int64_t position = a.positions ? a.positions[b * a.positions_stride_b + t] : a.start + t;
  const int64_t first = int64_t(blockIdx.y) * kColumns<kWidth, kForwardPacks> + int64_t(threadIdx.x % kWarp) * kWidth;
  T* out = static_cast<T*>(a.out) + r * a.C + first;
  const bool known = has(a.V, token) && has(a.P, position) && (!kTypes || has(a.V, type));
  if (known) {
    constexpr int kTables = kTypes ? 3 : 2;
    const T* row[3] = {static_cast<const T*>(a.wte) + token * a.stride_wte,
                       static_cast<const T*>(a.wpe) + position * a.stride_wpe,
                       static_cast<const T*>(a.wte) + type * a.stride_wte};
    Raw<T, kWidth> raw[kTables][kForwardPacks];
#pragma unroll
    for (int i = 0; i < kTables; ++i)
#pragma unroll
      for (int p = 0; p < kForwardPacks; ++p)
        if (first + p * kWarp * kWidth < a.C) raw[i][p] = load_raw<T, kWidth>(row[i] + first + p * kWarp * kWidth);
#pragma unroll
    for (int p = 0; p < kForwardPacks; ++p) {
      if (first + p * kWarp * kWidth >= a.C) return;
      float y[kWidth];
      load<T, kWidth>(reinterpret_cast<const T*>(&raw[0][p]), y);
#pragma unroll
      for (int i = 1; i < kTables; ++i) add<T, kWidth>(raw[i][p], y);
      store<T, kWidth>(out + p * kWarp * kWidth, y);
    }
  } else {
    float y[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) y[i] = __int_as_float(0x7fc00000);
#pragma unroll
    for (int p = 0; p < kForwardPacks; ++p)
      if (first + p * kWarp * kWidth < a.C) store<T, kWidth>(out + p * kWarp * kWidth, y);
  }
}

// A part of a sum: C numbers in float32. A segment has two parts: of the table row that it begins with, and of the one
// that goes on in the next segment. A pack of 16-bit numbers takes two accesses of float32. The first accesses of all
// lanes are neighbours in memory, and then come the second ones.
template <int kWidth>
struct Part {
  static constexpr int kStep = kWidth == 1 ? 1 : kPack<float>;
  float* at;
  int64_t next;  // the distance from one access of a lane to its next

  // `first` is the first of the columns of which each lane of the warp has one pack.
  __device__ __forceinline__ Part(const EmbeddingBackwardArgs& a, int64_t part, int64_t first, int lane) {
    const int64_t lanes = (a.C - first) / kWidth;
    at = a.parts + part * a.C + first + lane * kStep;
    next = (lanes < kWarp ? lanes : kWarp) * kStep;
  }
  __device__ __forceinline__ void read(float (&to)[kWidth]) const {
#pragma unroll
    for (int from = 0; from < kWidth; from += kStep) {
      float step[kStep];
      load<float, kStep>(at + from / kStep * next, step);
#pragma unroll
      for (int i = 0; i < kStep; ++i) to[from + i] = step[i];
    }
  }
  __device__ __forceinline__ void write(const float (&from)[kWidth]) const {
#pragma unroll
    for (int begin = 0; begin < kWidth; begin += kStep) {
      float step[kStep];
#pragma unroll
      for (int i = 0; i < kStep; ++i) step[i] = from[begin + i];
      store<float, kStep>(at + begin / kStep * next, step);
    }
  }
};

// Warp (i, j) has place i in the sorted list of rows and the j-th part of the columns. It has work only if place i is
// the first of its table row, in the whole list or in its segment. It then adds up the rows of dy from place i on,
// until the table row or the segment ends. The sum is the gradient of the table row, or a part of it if the table row
// has places in other segments too.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) embedding_backward_kernel(EmbeddingBackwardArgs a) {
  constexpr int kPacks = kBackwardPacks<kWidth>;
  const int64_t i = row_of_warp();
  if (i >= a.N) return;
  const int lane = threadIdx.x % kWarp;
  // The lists are read in aligned groups of 32, one number for each lane. The first group is the one that has place i.
  int64_t n = i - i % kWarp + lane;
  int64_t of_lane = n < a.N ? a.row[n] : -1, source = n < a.N ? a.source[n] : 0;
  const int64_t row = __shfl_sync(kAllLanes, of_lane, int(i % kWarp));
  const bool first = i == 0 || a.row[i - 1] != row;
  if (!(first || i % kSegmentRows == 0) || !has(a.count, row)) return;
  const int64_t last = (i / kSegmentRows + 1) * kSegmentRows, end = last < a.N ? last : a.N;
  const bool goes_on = end < a.N && a.row[end] == row;
  const int64_t begin = int64_t(blockIdx.y) * kColumns<kWidth, kPacks>;
  float total[kPacks][kWidth] = {};
  for (int from = int(i % kWarp);; from = 0) {
    const unsigned ours = __ballot_sync(kAllLanes, n >= i && n < end && of_lane == row);
    const int to = from + __popc(ours);
    // Tokens and token types are one list of 2 R numbers. Number `source` of that list belongs to row source % R of dy.
    const unsigned mine = unsigned(source) % unsigned(a.R);
    for (int k = from; k < to; k += kRowsAtOnce) {
      Raw<T, kWidth> dy[kRowsAtOnce][kPacks] = {};
#pragma unroll
      for (int at = 0; at < kRowsAtOnce; ++at) {
        const T* dy_row = static_cast<const T*>(a.dy) + __shfl_sync(kAllLanes, mine, k + at) * a.stride_dy_r;
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
          const int64_t column = begin + (p * kWarp + lane) * kWidth;
          if (k + at < to && column < a.C) dy[at][p] = load_raw<T, kWidth>(dy_row + column);
        }
      }
#pragma unroll
      for (int at = 0; at < kRowsAtOnce; ++at)
#pragma unroll
        for (int p = 0; p < kPacks; ++p) add<T, kWidth>(dy[at][p], total[p]);
    }
    n += kWarp;
    if (to < kWarp || n - lane >= end) break;
    of_lane = n < end ? a.row[n] : -1, source = n < end ? a.source[n] : 0;
  }
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int64_t turn = begin + p * kWarp * kWidth, column = turn + lane * kWidth;
    if (column >= a.C) continue;
    if (first && !goes_on)
      store<T, kWidth>(static_cast<T*>(a.out) + row * a.C + column, total[p]);
    else
      Part<kWidth>(a, i / kSegmentRows * 2 + (i % kSegmentRows != 0), turn, lane).write(total[p]);
  }
}

// Warp (s, j): if a table row begins in segment s and goes on in the next segment, the warp adds up the parts of that
// table row, for the j-th part of the columns.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) embedding_backward_join_kernel(EmbeddingBackwardArgs a) {
  constexpr int kPacks = kBackwardPacks<kWidth>;
  const int64_t s = row_of_warp(), next = (s + 1) * kSegmentRows;
  if (next >= a.N) return;
  const int64_t row = a.row[next];
  const bool goes_on = a.row[next - 1] == row, fills = a.row[next - kSegmentRows] == row;
  const bool begins = !fills || s == 0 || a.row[next - kSegmentRows - 1] != row;
  if (!goes_on || !begins || !has(a.count, row)) return;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int64_t turn = int64_t(blockIdx.y) * kColumns<kWidth, kPacks> + p * kWarp * kWidth;
    const int64_t column = turn + lane * kWidth;
    if (column >= a.C) return;
    float total[kWidth];
    Part<kWidth>(a, 2 * s + !fills, turn, lane).read(total);
    int same = kPartsAtOnce;  // how many of the next segments begin with this table row
    for (int64_t from = s + 1; same == kPartsAtOnce; from += kPartsAtOnce) {
      int64_t begins_with[kPartsAtOnce];
      float part[kPartsAtOnce][kWidth] = {};
#pragma unroll
      for (int k = 0; k < kPartsAtOnce; ++k) {
        const int64_t n = (from + k) * kSegmentRows;
        begins_with[k] = n < a.N ? a.row[n] : -1;
      }
      same = 0;
#pragma unroll
      for (int k = 0; k < kPartsAtOnce; ++k) same += begins_with[k] == row;
#pragma unroll
      for (int k = 0; k < kPartsAtOnce; ++k)
        if (k < same) Part<kWidth>(a, 2 * (from + k), turn, lane).read(part[k]);
#pragma unroll
      for (int k = 0; k < kPartsAtOnce; ++k)
#pragma unroll
        for (int c = 0; c < kWidth; ++c) total[c] += part[k][c];
    }
    store<T, kWidth>(static_cast<T*>(a.out) + row * a.C + column, total);
  }
}

// The grid for n rows of C columns, if a warp has `columns` columns of one row. It is empty if a grid cannot be so
// large.
dim3 grid_for(int64_t n, int64_t C, int columns) {
  const int64_t across = (C + columns - 1) / columns;
  if (n > INT32_MAX || across > kMostAcross) return dim3(0);
  return dim3(unsigned((n + kWarps - 1) / kWarps), unsigned(across));
}

template <class T, int kWidth>
cudaError_t launch_forward(const EmbeddingArgs& a, cudaStream_t stream) {
  const dim3 grid = grid_for(a.B * a.T, a.C, kColumns<kWidth, kForwardPacks>);
  if (!grid.x) return cudaErrorInvalidValue;
  auto* kernel = a.token_types ? embedding_kernel<T, kWidth, true> : embedding_kernel<T, kWidth, false>;
  kernel<<<grid, kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

template <class T, int kWidth>
cudaError_t launch_backward(const EmbeddingBackwardArgs& a, cudaStream_t stream) {
  constexpr int kOfWarp = kColumns<kWidth, kBackwardPacks<kWidth>>;
  const dim3 grid = grid_for(a.N, a.C, kOfWarp);
  if (!grid.x || a.R > INT32_MAX) return cudaErrorInvalidValue;
  embedding_backward_kernel<T, kWidth><<<grid, kThreads, 0, stream>>>(a);
  const int64_t joins = (a.N - 1) / kSegmentRows;  // pairs of a segment and the next
  if (joins) {
    const dim3 join_grid = grid_for(joins, a.C, kOfWarp);
    embedding_backward_join_kernel<T, kWidth><<<join_grid, kThreads, 0, stream>>>(a);
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t embedding(const EmbeddingArgs& a, cudaStream_t stream) {
  if (a.B * a.T == 0 || a.C == 0) return cudaSuccess;
  cudaError_t status = cudaSuccess;
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = packed<T>({a.wte, a.wpe, a.out}, {a.C, a.stride_wte, a.stride_wpe});
    status = wide ? launch_forward<T, kPack<T>>(a, stream) : launch_forward<T, 1>(a, stream);
  });
  return status;
}

cudaError_t embedding_backward(const EmbeddingBackwardArgs& a, cudaStream_t stream) {
  if (a.N == 0 || a.R == 0 || a.C == 0 || a.count == 0) return cudaSuccess;
  cudaError_t status = cudaSuccess;
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = packed<T>({a.dy, a.out, a.parts}, {a.C, a.stride_dy_r});
    status = wide ? launch_backward<T, kPack<T>>(a, stream) : launch_backward<T, 1>(a, stream);
  });
  return status;
}

}  // namespace gpt2fast::cuda

// The C interface. The arguments are the fields of the structs.
extern "C" int gpt2fast_embedding(const int64_t* tokens, const int64_t* positions, const int64_t* token_types,
                                  const void* wte, const void* wpe, void* out, int64_t B, int64_t T, int64_t C,
                                  int64_t V, int64_t P, int64_t start, int64_t positions_stride_b, int64_t stride_wte,
                                  int64_t stride_wpe, int64_t dtype, cudaStream_t stream) {
  using namespace gpt2fast;
  return cuda::embedding({.tokens = tokens,
                          .positions = positions,
                          .token_types = token_types,
                          .wte = wte,
                          .wpe = wpe,
                          .out = out,
                          .B = B,
                          .T = T,
                          .C = C,
                          .V = V,
                          .P = P,
                          .start = start,
                          .positions_stride_b = positions_stride_b,
                          .stride_wte = stride_wte,
                          .stride_wpe = stride_wpe,
                          .dtype = DType(dtype)},
                         stream);
}

extern "C" int gpt2fast_embedding_backward(const int64_t* row, const int64_t* source, const void* dy, void* out,
                                           float* parts, int64_t N, int64_t R, int64_t C, int64_t count,
                                           int64_t stride_dy_r, int64_t dtype, cudaStream_t stream) {
  using namespace gpt2fast;
  return cuda::embedding_backward({.row = row,
                                   .source = source,
                                   .dy = dy,
                                   .out = out,
                                   .parts = parts,
                                   .N = N,
                                   .R = R,
                                   .C = C,
                                   .count = count,
                                   .stride_dy_r = stride_dy_r,
                                   .dtype = DType(dtype)},
                                  stream);
}
