// y = gelu(x (+ bias)), and the gradient dx = dy gelu'(x). Every element is read once and written once.
//
// A block has kColumns columns of kRows rows; a thread has one pack of each of the rows, whose loads are under way
// together, and reads its pack of the bias once. x without gaps and without a bias is laid out anew: one long row, cut
// into rows of kColumns.
#include "activation.cuh"
#include "device.cuh"
#include "kernels.h"

namespace gpt2fast::cuda {
namespace {

constexpr int kThreads = 128, kRows = 4;  // of a block

// Which packs a thread has: kWidth columns from `column` on, of the rows from `first` on.
struct Place {
  int64_t column, first;
};

template <int kWidth>
__device__ __forceinline__ Place place(int64_t C) {
  constexpr int kColumns = kThreads * kWidth;
  const unsigned across = unsigned((C + kColumns - 1) / kColumns);
  const unsigned down = blockIdx.x / across;
  return {int64_t(blockIdx.x - down * across) * kColumns + threadIdx.x * kWidth, int64_t(down) * kRows};
}

// Elements beyond n are none: the last row of a long one that was cut.
__device__ __forceinline__ bool inside(int64_t row, int64_t R, int64_t column, int64_t C, int64_t n) {
  return row < R && column < C && row * C + column < n;
}

template <class T, int kWidth, Activation kForm>
__global__ void __launch_bounds__(kThreads) gelu_kernel(GeluArgs a, int64_t n) {
  const Place at = place<kWidth>(a.C);
  float x[kRows][kWidth], bias[kWidth] = {};
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (inside(at.first + r, a.R, at.column, a.C, n))
      load<T, kWidth>(static_cast<const T*>(a.x) + (at.first + r) * a.stride_x_r + at.column, x[r]);
  if (a.bias && at.column < a.C) load<T, kWidth>(static_cast<const T*>(a.bias) + at.column, bias);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (!inside(at.first + r, a.R, at.column, a.C, n)) continue;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) x[r][i] = activate<kForm>(x[r][i] + bias[i]);
    store<T, kWidth>(static_cast<T*>(a.y) + (at.first + r) * a.C + at.column, x[r]);
  }
}

template <class T, int kWidth, Activation kForm>
__global__ void __launch_bounds__(kThreads) gelu_backward_kernel(GeluBackwardArgs a, int64_t n) {
  const Place at = place<kWidth>(a.C);
  float x[kRows][kWidth], dy[kRows][kWidth];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (!inside(at.first + r, a.R, at.column, a.C, n)) continue;
    load<T, kWidth>(static_cast<const T*>(a.x) + (at.first + r) * a.stride_x_r + at.column, x[r]);
    load<T, kWidth>(static_cast<const T*>(a.dy) + (at.first + r) * a.stride_dy_r + at.column, dy[r]);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (!inside(at.first + r, a.R, at.column, a.C, n)) continue;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) dy[r][i] *= derivative<kForm>(x[r][i]);
    store<T, kWidth>(static_cast<T*>(a.dx) + (at.first + r) * a.C + at.column, dy[r]);
  }
}

// with_form(activation, [&](auto form) { ... form.value ... });
template <Activation kForm>
struct Form {
  static constexpr Activation value = kForm;
};
template <class F>
void with_form(Activation activation, F&& f) {
  activation == Activation::kGeluTanh ? f(Form<Activation::kGeluTanh>{}) : f(Form<Activation::kGeluErf>{});
}

// Blocks for R rows of C columns, 0 where a grid does not hold them.
int64_t blocks_for(int64_t R, int64_t C, int width) {
  const int64_t columns = kThreads * width;
  const int64_t blocks = (R + kRows - 1) / kRows * ((C + columns - 1) / columns);
  return blocks <= INT32_MAX ? blocks : 0;
}

// Rows without gaps between them as rows of whole blocks; returns their stride.
template <class Args>
int64_t lay_out_anew(Args& a, int width) {
  const int64_t n = a.R * a.C, columns = kThreads * width;
  a.R = (n + columns - 1) / columns, a.C = columns;
  return columns;
}

}  // namespace

cudaError_t gelu(const GeluArgs& args, cudaStream_t stream) {
  GeluArgs a = args;
  const int64_t n = a.R * a.C;
  if (n == 0) return cudaSuccess;
  cudaError_t status = cudaSuccess;
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool dense = !a.bias && a.stride_x_r == a.C;
    const bool wide = packed<T>({a.x, a.bias, a.y}, {dense ? n : a.C, dense ? n : a.stride_x_r});
    const int width = wide ? kPack<T> : 1;
    if (dense) a.stride_x_r = lay_out_anew(a, width);
    const int64_t blocks = blocks_for(a.R, a.C, width);
    if (!blocks) return void(status = cudaErrorInvalidValue);
    with_form(a.activation, [&](auto form) {
      auto* kernel = wide ? gelu_kernel<T, kPack<T>, form.value> : gelu_kernel<T, 1, form.value>;
      kernel<<<unsigned(blocks), kThreads, 0, stream>>>(a, n);
    });
  });
  return status == cudaSuccess ? cudaGetLastError() : status;
}

cudaError_t gelu_backward(const GeluBackwardArgs& args, cudaStream_t stream) {
  GeluBackwardArgs a = args;
  const int64_t n = a.R * a.C;
  if (n == 0) return cudaSuccess;
  cudaError_t status = cudaSuccess;
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool dense = a.stride_x_r == a.C && a.stride_dy_r == a.C;
    const bool wide =
        packed<T>({a.x, a.dy, a.dx}, {dense ? n : a.C, dense ? n : a.stride_x_r, dense ? n : a.stride_dy_r});
    const int width = wide ? kPack<T> : 1;
    if (dense) a.stride_x_r = a.stride_dy_r = lay_out_anew(a, width);
    const int64_t blocks = blocks_for(a.R, a.C, width);
    if (!blocks) return void(status = cudaErrorInvalidValue);
    with_form(a.activation, [&](auto form) {
      auto* kernel = wide ? gelu_backward_kernel<T, kPack<T>, form.value> : gelu_backward_kernel<T, 1, form.value>;
      kernel<<<unsigned(blocks), kThreads, 0, stream>>>(a, n);
    });
  });
  return status == cudaSuccess ? cudaGetLastError() : status;
}

}  // namespace gpt2fast::cuda

// For callers without C++: the structs' fields one by one.
extern "C" int gpt2fast_gelu(const void* x, const void* bias, void* y, int64_t R, int64_t C, int64_t stride_x_r,
                             int64_t activation, int64_t dtype, cudaStream_t stream) {
  using namespace gpt2fast;
  return cuda::gelu({.x = x,
                     .bias = bias,
                     .y = y,
                     .R = R,
                     .C = C,
                     .stride_x_r = stride_x_r,
                     .activation = Activation(activation),
                     .dtype = DType(dtype)},
                    stream);
}

extern "C" int gpt2fast_gelu_backward(const void* dy, const void* x, void* dx, int64_t R, int64_t C,
                                      int64_t stride_dy_r, int64_t stride_x_r, int64_t activation, int64_t dtype,
                                      cudaStream_t stream) {
  using namespace gpt2fast;
  return cuda::gelu_backward({.dy = dy,
                              .x = x,
                              .dx = dx,
                              .R = R,
                              .C = C,
                              .stride_dy_r = stride_dy_r,
                              .stride_x_r = stride_x_r,
                              .activation = Activation(activation),
                              .dtype = DType(dtype)},
                             stream);
}
