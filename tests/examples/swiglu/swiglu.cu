// SwiGLU in CUDA C++: a thread has one pack of 128 bits, or one element where the tensors are not aligned to packs.
#include "cuda/device.cuh"

namespace {

using namespace gpt2fast;
using namespace gpt2fast::cuda;

constexpr int kThreads = 256;

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(const T* gate, const T* up, T* y, int64_t n) {
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
  if (i >= n) return;
  float g[kWidth], u[kWidth];
  load<T, kWidth>(gate + i, g);
  load<T, kWidth>(up + i, u);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) g[k] = g[k] / (1 + expf(-g[k])) * u[k];
  store<T, kWidth>(y + i, g);
}

template <class T, int kWidth>
cudaError_t launch(const T* gate, const T* up, T* y, int64_t n, cudaStream_t stream) {
  const int64_t per_block = kThreads * kWidth, blocks = (n + per_block - 1) / per_block;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  swiglu_kernel<T, kWidth><<<unsigned(blocks), kThreads, 0, stream>>>(gate, up, y, n);
  return cudaGetLastError();
}

}  // namespace

// What Python calls: pointers, int64_t and float, the stream last. dtype is gpt2fast's number of it.
extern "C" int examples_swiglu(const void* gate, const void* up, void* y, int64_t n, int64_t dtype,
                               cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  cudaError_t status = cudaSuccess;
  with_dtype(DType(dtype), [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto* run = packed<T>({gate, up, y}, {n}) ? launch<T, kPack<T>> : launch<T, 1>;
    status = run(static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<T*>(y), n, stream);
  });
  return status;
}
