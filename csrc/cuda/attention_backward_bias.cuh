// The gradient of attention's bias.
#pragma once
#include "attention_backward.cuh"

namespace gpt2fast::cuda {
namespace attention_backward_parts {

// dbias is ds, summed where bias broadcasts. It is contiguous and has shape (B or 1, H or 1, T or 1, S or 1). A block
// has one tile of it, whose rows are queries and whose columns are keys. It loops in a fixed order over all tiles of ds
// that are added to it.
template <class T, int kD, bool kAligned>
__global__ void __launch_bounds__(Sizes<T, kD>::kThreads, 1)
    attention_backward_bias_kernel(const __grid_constant__ AttentionBackwardArgs a, int tiles_t, int tiles_s,
                                   int4 sizes) {
  using Size = Sizes<T, kD>;
  constexpr int kColumns = Size::kColumns, kRows = Size::kRows, kTiles = kColumns / kHalf;
  extern __shared__ __align__(128) uint16_t memory[];
  __shared__ float of_warps[Size::kWarps][kColumns];
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(memory));
  const AttentionArgs& forward = a.attention;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  // sizes: the shape of dbias, each of B, H, T and S or 1. The loop covers the axes of size 1, which are summed.
  const bool sums_t = sizes.z == 1, sums_s = sizes.w == 1;
  int block = blockIdx.x;
  const int own_s = sums_s ? 0 : block % tiles_s;
  block = sums_s ? block : block / tiles_s;
  const int own_t = sums_t ? 0 : block % tiles_t;
  block = sums_t ? block : block / tiles_t;
  const int own_h = block % sizes.y, own_b = block / sizes.y;
  const int count_s = sums_s ? tiles_s : 1, count_t = sums_t ? tiles_t : 1;
  const int count_h = sizes.y == 1 ? int(forward.H) : 1, count_b = sizes.x == 1 ? int(forward.B) : 1;

  float dbias[kTiles][4] = {};
  for (int64_t i = 0; i < int64_t(count_b) * count_h * count_t * count_s; ++i) {
    const int first = (own_t + int(i / count_s % count_t)) * kRows, column = (own_s + int(i % count_s)) * kColumns;
    const int64_t outer = i / (int64_t(count_s) * count_t);
    const int h = own_h + int(outer % count_h), b = own_b + int(outer / count_h);
    const Head<T, kD, kAligned, true, false> head(a, b * int(forward.H) + h, shared);
    if (head.sight.causal && column > first + kRows - 1 + head.sight.shift) continue;  // the whole block skips it
    __syncthreads();  // no warp still reads the tiles before
    const uint64_t row_bits = head.copy_rows(first), bits = head.copy_columns(0, column);
    wait_for_copies();
    __syncthreads();
    typename decltype(head)::Held held;
    head.hold(held, warp * kMma);
    typename decltype(head)::Row known = {};
    const int row = first + warp * kMma;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      known.there[r] = row_bits >> (warp * kMma + g + 8 * r) & 1;
      if (!known.there[r]) continue;
      const int query = row + g + 8 * r;
      known.lse[r] = head.statistics[0][query], known.delta[r] = head.statistics[1][query];
      known.excess[r] = head.statistics[2][query];
    }
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      float dropped[2][4], ds[2][4], p[2][4];
      head.probabilities(dropped, ds, p, held, known, 0, warp * kMma, row, column, n * kHalf, bits, false);
#pragma unroll
      for (int e = 0; e < 8; ++e) dbias[n + e / 4][e % 4] += ds[e / 4][e % 4];
    }
  }

  T* to = static_cast<T*>(a.dbias) + (int64_t(own_b) * sizes.y + own_h) * sizes.z * sizes.w;
  const int query = own_t * kRows + warp * kMma + g, key = own_s * kColumns + 2 * t;
  if (!sums_t) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = 0;
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          sum += dbias[n][2 * r + e];
          if (!sums_s && query + 8 * r < sizes.z && key + n * kHalf + e < sizes.w)
            to[int64_t(query + 8 * r) * sizes.w + key + n * kHalf + e] = narrow<T>(dbias[n][2 * r + e]);
        }
      sum = sum_of_row(sum);
      if (sums_s && t == 0 && query + 8 * r < sizes.z) to[query + 8 * r] = narrow<T>(sum);
    }
    return;
  }
  // Sums over the rows of a warp, then over the warps and, if S is summed too, over the columns.
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = dbias[n][e] + dbias[n][2 + e];
#pragma unroll
      for (int distance = 4; distance < kWarp; distance *= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
      if (g == 0) of_warps[warp][n * kHalf + 2 * t + e] = sum;
    }
  __syncthreads();
  if (warp > 0) return;
  float sum = 0;
  for (int c = lane; c < kColumns; c += kWarp) {
    float of_column = 0;
#pragma unroll
    for (int w = 0; w < Size::kWarps; ++w) of_column += of_warps[w][c];
    const int column = own_s * kColumns + c;
    if (!sums_s && column < sizes.w) to[column] = narrow<T>(of_column);
    sum += of_column;
  }
  sum = warp_sum(sum);
  if (sums_s && lane == 0) to[0] = narrow<T>(sum);
}

}  // namespace attention_backward_parts
}  // namespace gpt2fast::cuda
