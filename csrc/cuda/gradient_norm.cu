// The norm of many gradients, as if they were one vector, and the factor that clips it to max_norm:
//
//   norm = sqrt(sum of g^2)        factor = min(max_norm / (norm + eps), 1)
//
// The first kernel has one block of threads for each kNormNumbers numbers of a tensor (tensor_list.cuh), which adds up
// their squares. The second kernel is one block, which adds up these sums. There are no atomics, so that the bits are
// the same in every run. The floor is one read of the gradients; docs/kernels.md counts 1.02 to 1.04 times that.
#include "kernels.h"
#include "tensor_list.cuh"

namespace gpt2fast::cuda {
namespace {

constexpr int kThreads = 128;

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) gradient_squares_kernel(GradientNormArgs a) {
  constexpr int kSteps = kNormNumbers / (kThreads * kWidth);
  __shared__ float2 scratch[kWarp];
  const Share share(a.tensors, a.programs, kNormNumbers);
  const T* gradient = share.address<const T>(0);
  const int64_t end = share.end_of_groups(kWidth);
  float x[kSteps][kWidth] = {};
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int64_t at = share.first + (s * kThreads + int(threadIdx.x)) * kWidth;
    if (at < end) load<T, kWidth>(gradient + at, x[s]);
  }
  float squares = 0;
  const int64_t rest = end + threadIdx.x;  // less than a pack of numbers is left at the end of a tensor
  if (kWidth > 1 && rest < share.end) squares = widen(gradient[rest]) * widen(gradient[rest]);
#pragma unroll
  for (int s = 0; s < kSteps; ++s)
#pragma unroll
    for (int i = 0; i < kWidth; ++i) squares += x[s][i] * x[s][i];
  squares = block_sums(squares, 0, scratch).x;
  if (threadIdx.x == 0) a.squares[blockIdx.x] = squares;
}

__global__ void __launch_bounds__(kMaxThreads) gradient_norm_kernel(GradientNormArgs a) {
  __shared__ float2 scratch[kWarp];
  float total = 0;
  for (int64_t p = threadIdx.x; p < a.P; p += kMaxThreads) total += a.squares[p];
  const float norm = sqrtf(block_sums(total, 0, scratch).x);
  if (threadIdx.x > 0) return;
  const float factor = a.max_norm / (norm + a.eps);
  *a.norm = norm, *a.factor = factor > 1 ? 1 : factor;  // NaN stays NaN, as in the reference
}

}  // namespace

cudaError_t gradient_norm(const GradientNormArgs& a, cudaStream_t stream) {
  if (!fits_grid(a.P)) return cudaErrorInvalidValue;
  if (a.P > 0)
    with_dtype(a.dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      auto* kernel = a.aligned ? gradient_squares_kernel<T, kPack<T>> : gradient_squares_kernel<T, 1>;
      kernel<<<unsigned(a.P), kThreads, 0, stream>>>(a);
    });
  gradient_norm_kernel<<<1, kMaxThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace gpt2fast::cuda

// The C interface. The arguments are the fields of the struct.
extern "C" int gpt2fast_gradient_norm(const int64_t* tensors, const int32_t* programs, float* squares, float* norm,
                                      float* factor, int64_t P, int64_t aligned, float max_norm, float eps,
                                      int64_t dtype, cudaStream_t stream) {
  using namespace gpt2fast;
  return cuda::gradient_norm({.tensors = tensors,
                              .programs = programs,
                              .squares = squares,
                              .norm = norm,
                              .factor = factor,
                              .P = P,
                              .aligned = aligned != 0,
                              .max_norm = max_norm,
                              .eps = eps,
                              .dtype = DType(dtype)},
                             stream);
}
