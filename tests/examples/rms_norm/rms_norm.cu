// RMSNorm in CUDA C++. A block has a row; in the backward pass it walks down rows and keeps its share of dweight.
#include "cuda/device.cuh"

namespace {

using namespace gpt2fast;
using namespace gpt2fast::cuda;

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(const T* x, const T* weight, T* y, float* rstd, int64_t C, int64_t stride_x_r, float eps) {
  __shared__ float2 scratch[kWarp];
  const int64_t r = blockIdx.x;
  x += r * stride_x_r, y += r * C;
  float squares = 0;
  for (int64_t c = threadIdx.x; c < C; c += kThreads) squares += widen(x[c]) * widen(x[c]);
  const float scale = 1 / sqrtf(block_sums(squares, 0, scratch).x / C + eps);
  for (int64_t c = threadIdx.x; c < C; c += kThreads) y[c] = narrow<T>(widen(x[c]) * scale * widen(weight[c]));
  if (threadIdx.x == 0) rstd[r] = scale;
}

// partial (P, C) in float32, P the blocks: a thread has the same columns in every row, so that nothing is atomic.
template <class T>
__global__ void __launch_bounds__(kThreads)
    rms_norm_backward_kernel(const T* dy, const T* x, const T* weight, const float* rstd, T* dx, float* partial,
                             int64_t R, int64_t C, int64_t stride_dy_r, int64_t stride_x_r) {
  __shared__ float2 scratch[2][kWarp];  // rows take turns: one may still be read when the next is written
  partial += blockIdx.x * C;
  for (int64_t c = threadIdx.x; c < C; c += kThreads) partial[c] = 0;
  int turn = 0;
  for (int64_t r = blockIdx.x; r < R; r += gridDim.x, turn ^= 1) {
    const T *dy_row = dy + r * stride_dy_r, *x_row = x + r * stride_x_r;
    float sum = 0;
    for (int64_t c = threadIdx.x; c < C; c += kThreads) {
      const float n = widen(x_row[c]) * rstd[r];
      sum += widen(dy_row[c]) * widen(weight[c]) * n;
      partial[c] += widen(dy_row[c]) * n;
    }
    const float mean = block_sums(sum, 0, scratch[turn]).x / C;
    for (int64_t c = threadIdx.x; c < C; c += kThreads) {
      const float n = widen(x_row[c]) * rstd[r], g = widen(dy_row[c]) * widen(weight[c]);
      dx[r * C + c] = narrow<T>(rstd[r] * (g - n * mean));
    }
  }
}

}  // namespace

// What Python calls: pointers, int64_t and float, the stream last. dtype is gpt2fast's number of it.
extern "C" int examples_rms_norm(const void* x, const void* weight, void* y, float* rstd, int64_t R, int64_t C,
                                 int64_t stride_x_r, float eps, int64_t dtype, cudaStream_t stream) {
  if (R > INT32_MAX) return cudaErrorInvalidValue;
  if (R == 0) return cudaSuccess;
  with_dtype(DType(dtype), [&](auto tag) {
    using T = typename decltype(tag)::type;
    rms_norm_kernel<T><<<unsigned(R), kThreads, 0, stream>>>(static_cast<const T*>(x), static_cast<const T*>(weight),
                                                             static_cast<T*>(y), rstd, C, stride_x_r, eps);
  });
  return cudaGetLastError();
}

extern "C" int examples_rms_norm_backward(const void* dy, const void* x, const void* weight, const float* rstd,
                                          void* dx, float* partial, int64_t R, int64_t C, int64_t P,
                                          int64_t stride_dy_r, int64_t stride_x_r, int64_t dtype, cudaStream_t stream) {
  if (R == 0) return cudaSuccess;
  with_dtype(DType(dtype), [&](auto tag) {
    using T = typename decltype(tag)::type;
    rms_norm_backward_kernel<T><<<unsigned(P), kThreads, 0, stream>>>(
        static_cast<const T*>(dy), static_cast<const T*>(x), static_cast<const T*>(weight), rstd, static_cast<T*>(dx),
        partial, R, C, stride_dy_r, stride_x_r);
  });
  return cudaGetLastError();
}
