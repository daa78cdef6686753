// Layer norm over rows of C columns, and the gradients of x, weight and bias:
//
//   s = x (+ residual)        y = (s - mean(s)) rstd weight + bias
//   dx = rstd (g - avg(g) - n avg(g n))      dweight = sum over rows of dy n      dbias = sum over rows of dy
//   with n = (s - mean) rstd and g = dy weight
//
// Forward: a warp has a row of up to 1024 columns; a block has a longer row. A lane keeps its columns of s in
// registers, so that x is read once although mean and variance take two passes.
//
// Backward: there are P blocks. Block p takes the rows p, p + P, ... and keeps its share of dweight and dbias in
// registers. A second kernel adds up the P shares, in order. There are no atomics, so that the bits are the same in
// every run.
//
// The floor is memory traffic: x is read once and y is written once. Above it are weight and bias, which each row asks
// for again; they come from the cache. docs/kernels.md counts the bytes, docs/how/layer_norm.md explains them.
#include "device.cuh"
#include "kernels.h"

namespace gpt2fast::cuda {
namespace {

constexpr int64_t kWarpColumns = 1024;  // the most columns of a row that one warp has
constexpr int kWarpPerLane = 32;        // the most columns of a lane if a warp has the row
constexpr int kBlockPerLane = 16;       // the most columns of a lane if a block has the row
constexpr int kRowsPerBlock = 4;        // rows of a block if each warp has one
constexpr int kBackwardPerLane = 8;     // backward: columns of a lane; rows of more than 8192 have twice as many

// The number of forward blocks that must fit on a multiprocessor, or 0 for no demand. If a warp has a row and reads it
// in packs, 8 blocks must fit, which allows 64 registers a thread. By default the compiler aims at more blocks and
// spills registers.
constexpr int resident(bool warp_row, int width) { return warp_row && width > 1 ? 8 : 0; }

// Lane i of n lanes has the packs i, i + n, i + 2n, ... of its row, so that neighbouring lanes read neighbouring bytes.
template <class T, int kWidth, bool kWarpRow, bool kResidual>
__global__ void __launch_bounds__(kWarpRow ? kRowsPerBlock * kWarp : kMaxThreads, resident(kWarpRow, kWidth))
    layer_norm_kernel(LayerNormArgs a) {
  constexpr int kPacks = (kWarpRow ? kWarpPerLane : kBlockPerLane) / kWidth;
  __shared__ float2 scratch[2][kWarp];
  const int lane = kWarpRow ? threadIdx.x % kWarp : threadIdx.x, lanes = kWarpRow ? kWarp : blockDim.x;
  const int64_t row = kWarpRow ? int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp : blockIdx.x;
  if (row >= a.R) return;  // only whole warps return, and none if a block has the row, so that no barrier is missed
  const int C = int(a.C);
  const T* x = static_cast<const T*>(a.x) + row * a.stride_x_r;
  const T* residual = kResidual ? static_cast<const T*>(a.residual) + row * a.stride_residual_r : nullptr;

  float s[kPacks][kWidth];
  float total = 0;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int column = (p * lanes + lane) * kWidth;
    if (column >= C) continue;
    load<T, kWidth>(x + column, s[p]);
    if constexpr (kResidual) {
      float added[kWidth];
      load<T, kWidth>(residual + column, added);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) s[p][i] = widen(narrow<T>(s[p][i] + added[i]));  // rounded, as it is stored
      store<T, kWidth>(static_cast<T*>(a.sum) + row * C + column, s[p]);
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) total += s[p][i];
  }
  const float mean = (kWarpRow ? warp_sum(total) : block_sums(total, 0, scratch[0]).x) / C;

  float squares = 0;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    if ((p * lanes + lane) * kWidth >= C) continue;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) squares += (s[p][i] - mean) * (s[p][i] - mean);
  }
  const float variance = (kWarpRow ? warp_sum(squares) : block_sums(squares, 0, scratch[1]).x) / C;
  const float rstd = 1 / sqrtf(variance + a.eps);
  if (lane == 0) a.mean[row] = mean, a.rstd[row] = rstd;

#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int column = (p * lanes + lane) * kWidth;
    if (column >= C) continue;
    float weight[kWidth], bias[kWidth];
    load<T, kWidth>(static_cast<const T*>(a.weight) + column, weight);
    load<T, kWidth>(static_cast<const T*>(a.bias) + column, bias);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) s[p][i] = (s[p][i] - mean) * rstd * weight[i] + bias[i];
    store<T, kWidth>(static_cast<T*>(a.y) + row * C + column, s[p]);
  }
}

// n, g and dy (see the top of this file) of one pack of a row.
template <class T, int kWidth>
struct Pack {
  float n[kWidth], g[kWidth], dy[kWidth];

  __device__ __forceinline__ Pack(const LayerNormBackwardArgs& a, int64_t row, int column, float mean, float rstd) {
    float weight[kWidth];
    load<T, kWidth>(static_cast<const T*>(a.x) + row * a.stride_x_r + column, n);
    load<T, kWidth>(static_cast<const T*>(a.dy) + row * a.stride_dy_r + column, dy);
    load<T, kWidth>(static_cast<const T*>(a.weight) + column, weight);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      n[i] = (n[i] - mean) * rstd;
      g[i] = __fmul_rn(dy[i], weight[i]);  // no fused multiply-add: sums and dx must use the same rounded number
    }
  }
};

// kHeld: a lane keeps n and g in registers between the sums and dx. The longest rows do not fit; they are read a second
// time, from the cache.
template <class T, int kWidth, int kPerLane>
__global__ void __launch_bounds__(kMaxThreads) layer_norm_backward_kernel(LayerNormBackwardArgs a) {
  constexpr int kPacks = kPerLane / kWidth;
  constexpr bool kHeld = kPerLane <= kBackwardPerLane;
  __shared__ float2 scratch[2][kWarp];  // rows use the two in turn, so that one barrier a row is enough
  const int C = int(a.C);
  float dweight[kPacks][kWidth] = {}, dbias[kPacks][kWidth] = {};
  int turn = 0;
  for (int64_t row = blockIdx.x; row < a.R; row += a.P, turn ^= 1) {
    const float mean = a.mean[row], rstd = a.rstd[row];
    float n[kPacks][kWidth], g[kPacks][kWidth];
    float sum_g = 0, sum_gn = 0;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int column = (p * blockDim.x + threadIdx.x) * kWidth;
      if (column >= C) continue;
      const Pack<T, kWidth> pack(a, row, column, mean, rstd);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        dweight[p][i] += pack.dy[i] * pack.n[i];
        dbias[p][i] += pack.dy[i];
        sum_g += pack.g[i];
        sum_gn += pack.g[i] * pack.n[i];
        if constexpr (kHeld) n[p][i] = pack.n[i], g[p][i] = pack.g[i];
      }
    }
    const float2 sums = block_sums(sum_g, sum_gn, scratch[turn]);
    const float average_g = sums.x / C, average_gn = sums.y / C;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int column = (p * blockDim.x + threadIdx.x) * kWidth;
      if (column >= C) continue;
      if constexpr (!kHeld) {
        const Pack<T, kWidth> pack(a, row, column, mean, rstd);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) n[p][i] = pack.n[i], g[p][i] = pack.g[i];
      }
#pragma unroll
      for (int i = 0; i < kWidth; ++i) g[p][i] = rstd * (g[p][i] - average_g - n[p][i] * average_gn);
      store<T, kWidth>(static_cast<T*>(a.dx) + row * C + column, g[p]);
    }
  }
  float* mine = a.partial + int64_t(blockIdx.x) * 2 * C;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int column = (p * blockDim.x + threadIdx.x) * kWidth;
    if (column >= C) continue;
    constexpr int kStep = kWidth == 1 ? 1 : kPack<float>;
#pragma unroll
    for (int first = 0; first < kWidth; first += kStep) {
      float of_weight[kStep], of_bias[kStep];
#pragma unroll
      for (int i = 0; i < kStep; ++i) of_weight[i] = dweight[p][first + i], of_bias[i] = dbias[p][first + i];
      store<float, kStep>(mine + column + first, of_weight);
      store<float, kStep>(mine + C + column + first, of_bias);
    }
  }
}

// Adds up the shares. A block has 32 of the 2 C columns of partial. Its warp w adds the shares w, w + kSumWarps, ... in
// that order.
constexpr int kSumWarps = 8;
template <class T>
__global__ void __launch_bounds__(kSumWarps* kWarp) layer_norm_partial_kernel(LayerNormBackwardArgs a) {
  __shared__ float sums[kSumWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t column = int64_t(blockIdx.x) * kWarp + lane;
  float sum = 0;
  if (column < 2 * a.C)
    for (int64_t p = warp; p < a.P; p += kSumWarps) sum += a.partial[p * 2 * a.C + column];
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= 2 * a.C) return;
#pragma unroll
  for (int w = 1; w < kSumWarps; ++w) sum += sums[w][lane];
  T* to = column < a.C ? static_cast<T*>(a.dweight) + column : static_cast<T*>(a.dbias) + column - a.C;
  *to = narrow<T>(sum);
}

template <class T, int kWidth, bool kResidual>
void launch_forward(const LayerNormArgs& a, cudaStream_t stream) {
  if (a.C <= kWarpColumns) {
    const unsigned blocks = unsigned((a.R + kRowsPerBlock - 1) / kRowsPerBlock);
    layer_norm_kernel<T, kWidth, true, kResidual><<<blocks, kRowsPerBlock * kWarp, 0, stream>>>(a);
  } else {
    layer_norm_kernel<T, kWidth, false, kResidual><<<unsigned(a.R), threads_for(a.C, 8), 0, stream>>>(a);
  }
}

template <class T, int kWidth>
void launch_backward(const LayerNormBackwardArgs& a, cudaStream_t stream) {
  const bool fits = a.C <= int64_t(kMaxThreads) * kBackwardPerLane;
  auto* kernel = fits ? layer_norm_backward_kernel<T, kWidth, kBackwardPerLane>
                      : layer_norm_backward_kernel<T, kWidth, 2 * kBackwardPerLane>;
  kernel<<<unsigned(a.P), threads_for(a.C, kBackwardPerLane), 0, stream>>>(a);
}

static_assert(kWarpColumns <= kWarp * kWarpPerLane && kLongestRow <= kMaxThreads * kBlockPerLane &&
              kLongestRow <= kMaxThreads * 2 * kBackwardPerLane);

bool covered(int64_t R, int64_t C) { return 1 <= C && C <= kLongestRow && R <= INT32_MAX; }

}  // namespace

cudaError_t layer_norm(const LayerNormArgs& a, cudaStream_t stream) {
  if (!covered(a.R, a.C)) return cudaErrorInvalidValue;
  if (a.R == 0) return cudaSuccess;
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = packed<T>({a.x, a.residual, a.weight, a.bias, a.y, a.sum},
                                {a.C, a.stride_x_r, a.residual ? a.stride_residual_r : 0});
    auto* launch = a.residual ? (wide ? launch_forward<T, kPack<T>, true> : launch_forward<T, 1, true>)
                              : (wide ? launch_forward<T, kPack<T>, false> : launch_forward<T, 1, false>);
    launch(a, stream);
  });
  return cudaGetLastError();
}

cudaError_t layer_norm_backward(const LayerNormBackwardArgs& a, cudaStream_t stream) {
  if (!covered(a.R, a.C) || a.P < 1 || a.P > INT32_MAX) return cudaErrorInvalidValue;
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = packed<T>({a.dy, a.x, a.weight, a.dx, a.partial}, {a.C, a.stride_dy_r, a.stride_x_r});
    wide ? launch_backward<T, kPack<T>>(a, stream) : launch_backward<T, 1>(a, stream);
    const unsigned blocks = unsigned((2 * a.C + kWarp - 1) / kWarp);
    layer_norm_partial_kernel<T><<<blocks, kSumWarps * kWarp, 0, stream>>>(a);
  });
  return cudaGetLastError();
}

}  // namespace gpt2fast::cuda

// The C interface. The arguments are the fields of the structs.
extern "C" int gpt2fast_layer_norm(const void* x, const void* residual, const void* weight, const void* bias, void* y,
                                   void* sum, float* mean, float* rstd, int64_t R, int64_t C, int64_t stride_x_r,
                                   int64_t stride_residual_r, float eps, int64_t dtype, cudaStream_t stream) {
  using namespace gpt2fast;
  return cuda::layer_norm({.x = x,
                           .residual = residual,
                           .weight = weight,
                           .bias = bias,
                           .y = y,
                           .sum = sum,
                           .mean = mean,
                           .rstd = rstd,
                           .R = R,
                           .C = C,
                           .stride_x_r = stride_x_r,
                           .stride_residual_r = stride_residual_r,
                           .eps = eps,
                           .dtype = DType(dtype)},
                          stream);
}

extern "C" int gpt2fast_layer_norm_backward(const void* dy, const void* x, const void* weight, const float* mean,
                                            const float* rstd, void* dx, void* dweight, void* dbias, float* partial,
                                            int64_t R, int64_t C, int64_t P, int64_t stride_dy_r, int64_t stride_x_r,
                                            int64_t dtype, cudaStream_t stream) {
  using namespace gpt2fast;
  return cuda::layer_norm_backward({.dy = dy,
                                    .x = x,
                                    .weight = weight,
                                    .mean = mean,
                                    .rstd = rstd,
                                    .dx = dx,
                                    .dweight = dweight,
                                    .dbias = dbias,
                                    .partial = partial,
                                    .R = R,
                                    .C = C,
                                    .P = P,
                                    .stride_dy_r = stride_dy_r,
                                    .stride_x_r = stride_x_r,
                                    .dtype = DType(dtype)},
                                   stream);
}
