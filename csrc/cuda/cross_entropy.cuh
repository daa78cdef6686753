// A row of logits as a block reads it: log sum exp in one pass, and the gradient of its logits in another.
//
// A row may begin anywhere: rows of 50257 columns of 16 bits do. Its columns before the first whole sector of memory
// and those after the last whole pack go one by one, all between by packs of 128 bits.
#pragma once
#include "device.cuh"

namespace gpt2fast::cuda {

constexpr int kRowThreads = 256;  // of a block, which has one row
constexpr int kRowAhead = 4;      // packs of a thread whose loads are under way together
// Blocks that a multiprocessor holds, at up to 48 registers a thread. Left to itself the compiler aims at more, and
// spills.
constexpr int kRowsResident = 5;
constexpr int kSectorBytes = 32;                                                    // what memory moves at least
constexpr int64_t kMostColumns = INT32_MAX - kRowThreads * kRowAhead * kPackBytes;  // so that an int numbers them

// kPacks packs of kWidth columns each, kStep columns apart.
template <int kPacksOfTile, int kWidthOfPack>
struct Tile {
  static constexpr int kPacks = kPacksOfTile, kWidth = kWidthOfPack, kStep = kRowThreads * kWidth;

  template <class T>
  static __device__ __forceinline__ void read(const T* from, float (&x)[kPacks][kWidth]) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) load<T, kWidth>(from + p * kStep, x[p]);
  }
  template <class T>
  static __device__ __forceinline__ void write(T* to, const float (&x)[kPacks][kWidth]) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) store<T, kWidth>(to + p * kStep, x[p]);
  }
};

// f(column, Tile) for the tiles that a thread has of columns begin to end: neighbouring threads have neighbouring
// packs.
template <int kWidth, class F>
__device__ __forceinline__ void walk_packs(int begin, int end, F&& f) {
  constexpr int kStep = kRowThreads * kWidth;
  int column = begin + int(threadIdx.x) * kWidth;
  for (; column + (kRowAhead - 1) * kStep < end; column += kRowAhead * kStep) f(column, Tile<kRowAhead, kWidth>{});
  for (; column < end; column += kStep) f(column, Tile<1, kWidth>{});
}

// The same for a row of V columns that begins at `row`: the first warp has the columns before the packs, the last warp
// those after them.
template <class T, class F>
__device__ __forceinline__ void walk_row(const T* row, int V, F&& f) {
  const int before = int(reinterpret_cast<uintptr_t>(row) % kSectorBytes / sizeof(T));
  const int begin = min(V, before ? int(kSectorBytes / sizeof(T)) - before : 0);
  const int end = V - (V - begin) % kPack<T>;
  walk_packs<kPack<T>>(begin, end, f);
  const int lane = threadIdx.x % kWarp;
  if (threadIdx.x < kWarp && lane < begin) f(lane, Tile<1, 1>{});
  if (threadIdx.x >= kRowThreads - kWarp && lane < V - end) f(end + lane, Tile<1, 1>{});
}

// 2^x; what is below the smallest normal number becomes 0.
__device__ __forceinline__ float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What is kept of the columns seen so far: the greatest, and sums of what depends on the differences from it. These
// keep their digits however large the logits are. With kMean the differences themselves are summed, for the mean logit.
template <bool kMean>
struct RowSums {
  static constexpr float kLog2E = 1.4426950408889634f;

  // From the lowest number on, not from -infinity: columns of -infinity alone then have the sum 0 and not NaN.
  float peak = -3.402823466e38f, total = 0, differences = 0;  // total: of e^(x - peak)
  int seen = 0;

  // The same sums relative to a greater logit.
  __device__ __forceinline__ void raise(float to) {
    total *= power_of_2((peak - to) * kLog2E);
    if (kMean && seen) differences += float(seen) * (peak - to);
    peak = to;
  }

  template <int kPacks, int kWidth>
  __device__ __forceinline__ void add(const float (&x)[kPacks][kWidth]) {
    float top = peak;
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
#pragma unroll
      for (int i = 0; i < kWidth; ++i) top = fmaxf(top, x[p][i]);
    raise(top);
    float of_pack[kPacks] = {}, differences_of_pack[kPacks] = {};
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        of_pack[p] += power_of_2((x[p][i] - peak) * kLog2E);
        if constexpr (kMean) differences_of_pack[p] += x[p][i] - peak;
      }
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      total += of_pack[p];
      differences += differences_of_pack[p];
    }
    seen += kPacks * kWidth;
  }

  // The sums of the whole block, in every thread, added in a fixed order.
  __device__ __forceinline__ void merge() {
    constexpr int kWarps = kRowThreads / kWarp;
    __shared__ float peaks[kWarps];
    __shared__ float2 scratch[kWarp];
    float top = peak;
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, distance));
    if (threadIdx.x % kWarp == 0) peaks[threadIdx.x / kWarp] = top;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, peaks[w]);
    raise(top);
    const float2 sums = block_sums(total, differences, scratch);
    total = sums.x, differences = sums.y;
  }
};

// Of a row of V columns, in every thread. Its shared memory allows for one call in a kernel.
template <bool kMean, class T>
__device__ __forceinline__ RowSums<kMean> sums_of_row(const T* row, int V) {
  RowSums<kMean> sums;
  walk_row(row, V, [&](int column, auto tile) {
    float x[tile.kPacks][tile.kWidth];
    tile.read(row + column, x);
    sums.add(x);
  });
  sums.merge();
  return sums;
}

// dlogit = scale (p - uniform), and less by scale share at the target; p = e^(logit - shift) / 2^log2_total.
struct LogitGradient {
  float shift, log2_total, scale, uniform, share;
  int target;  // its column, -1 for none

  template <int kPacks, int kWidth>
  __device__ __forceinline__ void apply(float (&x)[kPacks][kWidth], int column) const {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i)
        x[p][i] = power_of_2((x[p][i] - shift) * RowSums<false>::kLog2E - log2_total) - uniform;
      const int at = target - (column + p * Tile<kPacks, kWidth>::kStep);
      if (unsigned(at) < unsigned(kWidth)) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i)
          if (i == at) x[p][i] -= share;
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[p][i] *= scale;
    }
  }
};

// The gradient of a row of V logits. It may be written over them: a thread reads no column but those that it writes.
template <class T>
__device__ __forceinline__ void write_gradient(const T* logits, T* dlogits, int V, const LogitGradient& gradient) {
  const auto move = [&](int column, auto tile) {
    float x[tile.kPacks][tile.kWidth];
    tile.read(logits + column, x);
    gradient.apply(x, column);
    tile.write(dlogits + column, x);
  };
  // Where the two are not aligned alike, as with rows of logits that have gaps between them, both go one by one:
  // neighbouring threads still have neighbours, so that memory moves no more than it must.
  if ((reinterpret_cast<uintptr_t>(logits) - reinterpret_cast<uintptr_t>(dlogits)) % kPackBytes == 0)
    walk_row(dlogits, V, move);
  else
    walk_packs<1>(0, V, move);
}

}  // namespace gpt2fast::cuda
