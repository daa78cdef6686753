// scale_bias_add in CUDA C++: a block has a row; a thread has packs of 128 bits, or single elements where the rows are
// not aligned to packs.
#include "cuda/device.cuh"

namespace {

using namespace gpt2fast;
using namespace gpt2fast::cuda;

constexpr int kThreads = 128;

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    scale_bias_add_kernel(const T* x, const T* scale, const T* bias, const T* residual, T* y, int64_t C,
                          int64_t stride_x_r, int64_t stride_residual_r) {
  const int64_t r = blockIdx.x;
  x += r * stride_x_r, residual += r * stride_residual_r, y += r * C;
  for (int64_t c = threadIdx.x * kWidth; c < C; c += kThreads * kWidth) {
    float v[kWidth], s[kWidth], b[kWidth], add[kWidth];
    load<T, kWidth>(x + c, v);
    load<T, kWidth>(scale + c, s);
    load<T, kWidth>(bias + c, b);
    load<T, kWidth>(residual + c, add);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) v[i] = v[i] * s[i] + b[i] + add[i];
    store<T, kWidth>(y + c, v);
  }
}

}  // namespace

// What Python calls: pointers and int64_t, the stream last. dtype is gpt2fast's number of it.
extern "C" int scale_bias_add(const void* x, const void* scale, const void* bias, const void* residual, void* y,
                              int64_t R, int64_t C, int64_t stride_x_r, int64_t stride_residual_r, int64_t dtype,
                              cudaStream_t stream) {
  if (R > INT32_MAX) return cudaErrorInvalidValue;
  with_dtype(DType(dtype), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = packed<T>({x, scale, bias, residual, y}, {C, stride_x_r, stride_residual_r});
    auto* kernel = wide ? scale_bias_add_kernel<T, kPack<T>> : scale_bias_add_kernel<T, 1>;
    kernel<<<unsigned(R), kThreads, 0, stream>>>(static_cast<const T*>(x), static_cast<const T*>(scale),
                                                 static_cast<const T*>(bias), static_cast<const T*>(residual),
                                                 static_cast<T*>(y), C, stride_x_r, stride_residual_r);
  });
  return cudaGetLastError();
}
