// y = gelu(x (+ bias)), and the gradient dx = dy gelu'(x). The formulas are in activation.cuh.
//
// The floor is memory traffic: each element is read once and written once. docs/kernels.md counts no more than that
// without a bias, and 1.10 times that with one. A block has kColumns columns of kRows rows. A thread has one pack of
// each of these rows, starts all its loads before it computes, and reads its pack of the bias once. A contiguous x
// without a bias is treated as one long row, cut into rows of kColumns.
#include "activation.cuh"
#include "device.cuh"
#include "kernels.h"

namespace gpt2fast::cuda {
namespace {

constexpr int kThreads = 128, kRows = 4;  // of a block

// The packs of a thread: kWidth columns from `column` on, in each of the rows from `first` on.
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

// Whether an element exists. n is the number of elements: the last row of a cut long row may be shorter than the
// others.
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

// The number of blocks for R rows of C columns, or 0 if a grid cannot have so many.
int64_t blocks_for(int64_t R, int64_t C, int width) {
  const int64_t columns = kThreads * width;
  const int64_t blocks = (R + kRows - 1) / kRows * ((C + columns - 1) / columns);
  return blocks <= INT32_MAX ? blocks : 0;
}

// Cuts contiguous elements into rows as wide as a block. Changes R and C and returns the stride of the new rows.
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

// The C interface. The arguments are the fields of the structs.
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
