// How a block reads a row of logits: log sum exp takes one pass, and the gradient of the logits takes another.
//
// A row of 50257 columns, as GPT-2 has, usually does not begin at an aligned address. The columns before the first
// whole sector of memory (32 bytes) and those after the last whole pack are read one by one. All columns between are
// read in packs of 128 bits.
#pragma once
#include "device.cuh"

namespace gpt2fast::cuda {

constexpr int kRowThreads = 256;  // threads of a block, which has one row
constexpr int kRowAhead = 4;      // packs that a thread loads together
// Blocks that must fit on a multiprocessor, which allows 48 registers a thread. By default the compiler aims at more
// blocks and spills registers.
constexpr int kRowsResident = 5;
constexpr int kSectorBytes = 32;                                                    // the least that memory moves
constexpr int64_t kMostColumns = INT32_MAX - kRowThreads * kRowAhead * kPackBytes;  // an int can number the columns

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

// Calls f(column, Tile) for each of this thread's tiles of the columns from begin to end. Neighbouring threads have
// neighbouring packs.
template <int kWidth, class F>
__device__ __forceinline__ void walk_packs(int begin, int end, F&& f) {
  constexpr int kStep = kRowThreads * kWidth;
  int column = begin + int(threadIdx.x) * kWidth;
  for (; column + (kRowAhead - 1) * kStep < end; column += kRowAhead * kStep) f(column, Tile<kRowAhead, kWidth>{});
  for (; column < end; column += kStep) f(column, Tile<1, kWidth>{});
}

// The same for a row of V columns that begins at `row`. The first warp also has the single columns before the packs,
// and the last warp those after them.
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

// 2^x, approximately. Results below the smallest normal number become 0.
__device__ __forceinline__ float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What a thread keeps of the columns that it has seen: the greatest logit (peak), and sums that depend only on the
// differences from it. Differences keep their digits however large the logits are. kMean: the differences themselves
// are summed too, for the mean of the logits.
template <bool kMean>
struct RowSums {
  static constexpr float kLog2E = 1.4426950408889634f;

  // peak begins with the lowest number, not with -infinity. So columns that are all -infinity have the sum 0, not NaN.
  float peak = -3.402823466e38f, total = 0, differences = 0;  // total: the sum of e^(x - peak)
  int seen = 0;

  // Makes the sums relative to a greater logit.
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

  // Gives every thread the sums of the whole block, added in a fixed order.
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

// The sums of a row of V columns, in every thread. A kernel may call this only once, because merge() has no barrier
// that protects its shared memory.
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

// The gradient of a logit is scale (p - uniform), and scale (p - uniform - share) at the target, where
// p = e^(logit - shift) / 2^log2_total.
struct LogitGradient {
  float shift, log2_total, scale, uniform, share;
  int target;  // the target's column, or -1 for none

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

// Writes the gradient of a row of V logits. It may overwrite the logits, since a thread reads only the columns that it
// writes.
template <class T>
__device__ __forceinline__ void write_gradient(const T* logits, T* dlogits, int V, const LogitGradient& gradient) {
  const auto move = [&](int column, auto tile) {
    float x[tile.kPacks][tile.kWidth];
    tile.read(logits + column, x);
    gradient.apply(x, column);
    tile.write(dlogits + column, x);
  };
  // If the two rows do not have the same alignment, as when there are gaps between the rows of logits, columns are read
  // and written one by one. Neighbouring threads still have neighbouring columns, so that memory moves no extra
  // sectors.
  if ((reinterpret_cast<uintptr_t>(logits) - reinterpret_cast<uintptr_t>(dlogits)) % kPackBytes == 0)
    walk_row(dlogits, V, move);
  else
    walk_packs<1>(0, V, move);
}

}  // namespace gpt2fast::cuda
