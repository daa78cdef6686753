// Cross entropy of each row of logits (R, V) with label smoothing e, and its gradient:
//
//   lse = log sum exp(logits)        loss = lse - (1 - e) logits[target] - e avg(logits)
//   dlogits = dloss (softmax(logits) - (1 - e) onehot(target) - e / V)
//
// A block has a row. Forward, every thread keeps the greatest logit that it has seen and the sum of exponentials
// relative to it. So one pass over the row is enough, and the threads are joined once, at its end. Backward, the row is
// read once and its gradient is written once. One more block adds up the losses of the rows, or counts the rows that
// matter for the mean. There are no atomics, so that the bits are the same in every run.
//
// The floor is memory traffic: each logit once forward; each logit and its gradient once backward. docs/kernels.md
// counts 1.00 times that.
#include "cross_entropy.cuh"
#include "kernels.h"

namespace gpt2fast::cuda {
namespace {

// Above this |lse|, the rounding of lse to 24 bits may change e^(logit - lse) by more than 1.5e-5 of its value.
constexpr float kLargeLse = 256;

template <class T, bool kSmoothing>
__global__ void __launch_bounds__(kRowThreads, kRowsResident) cross_entropy_kernel(CrossEntropyArgs a) {
  const int64_t row = blockIdx.x;
  const T* logits = static_cast<const T*>(a.logits) + row * a.stride_logits_r;
  int64_t target = a.ignore_index;
  float at_target[1] = {__int_as_float(0x7fffffff)};  // NaN, if the row has no such column
  if (threadIdx.x == 0) {
    target = a.targets[row];
    if (0 <= target && target < a.V) load<T, 1>(logits + target, at_target);
  }
  const RowSums<kSmoothing> sums = sums_of_row<kSmoothing>(logits, int(a.V));
  if (threadIdx.x > 0) return;
  const float log_total = logf(sums.total);
  // The loss is a sum of differences from the greatest logit, which keep their digits however large the logits are.
  float loss = sums.peak - at_target[0] + log_total;
  if constexpr (kSmoothing) {
    const float e = a.label_smoothing;
    loss = (1 - e) * loss + e * (log_total - sums.differences / float(a.V));
  }
  a.loss[row] = target == a.ignore_index ? 0 : loss;
  a.lse[row] = sums.peak + log_total;
}

template <class T>
__global__ void __launch_bounds__(kRowThreads, kRowsResident)
    cross_entropy_backward_kernel(CrossEntropyBackwardArgs a) {
  const int64_t row = blockIdx.x;
  const int V = int(a.V);
  const T* logits = static_cast<const T*>(a.logits) + row * a.stride_logits_r;
  T* dlogits = static_cast<T*>(a.dlogits) + row * a.V;
  const int64_t target = a.targets[row];
  if (target == a.ignore_index) {  // the gradient is 0, and the logits are not read
    walk_row(dlogits, V, [&](int column, auto tile) {
      const float zeros[tile.kPacks][tile.kWidth] = {};
      tile.write(dlogits + column, zeros);
    });
    return;
  }
  const float* scale = a.mean ? a.scale : a.dloss + row * a.stride_dloss;
  LogitGradient gradient{.shift = a.lse[row],
                         .log2_total = 0,
                         .scale = *scale,
                         .uniform = a.label_smoothing / float(V),
                         .share = 1 - a.label_smoothing,
                         .target = 0 <= target && target < V ? int(target) : -1};
  // A large lse has no digits left for the log of the sum. The row is then read twice: first for its greatest logit and
  // the sum, which together stand for lse.
  if (fabsf(gradient.shift) > kLargeLse) {
    const RowSums<false> sums = sums_of_row<false>(logits, V);
    gradient.shift = sums.peak, gradient.log2_total = log2f(sums.total);
  }
  write_gradient(logits, dlogits, V, gradient);
}

// How many of this thread's share of the rows have a target that is not ignored.
__device__ __forceinline__ float counted(const int64_t* targets, int64_t R, int64_t ignore_index) {
  int count = 0;
  for (int64_t r = threadIdx.x; r < R; r += kMaxThreads) count += targets[r] != ignore_index;
  return float(count);
}

__global__ void __launch_bounds__(kMaxThreads) cross_entropy_reduce_kernel(CrossEntropyReduceArgs a) {
  __shared__ float2 scratch[kWarp];
  float total = 0;
  for (int64_t r = threadIdx.x; r < a.R; r += kMaxThreads) total += a.loss[r];
  const float count = a.mean ? counted(a.targets, a.R, a.ignore_index) : 1;
  const float2 sums = block_sums(total, count, scratch);
  if (threadIdx.x == 0) *a.out = a.mean ? sums.x / sums.y : sums.x;
}

// The factor of each row's gradient if the loss is the mean over the rows.
__global__ void __launch_bounds__(kMaxThreads) cross_entropy_scale_kernel(CrossEntropyBackwardArgs a) {
  __shared__ float2 scratch[kWarp];
  const float count = block_sums(counted(a.targets, a.R, a.ignore_index), 0, scratch).x;
  if (threadIdx.x == 0) *a.scale = *a.dloss / count;
}

bool covered(int64_t R, int64_t V) { return 0 <= V && V <= kMostColumns && R <= INT32_MAX; }

}  // namespace

cudaError_t cross_entropy(const CrossEntropyArgs& a, cudaStream_t stream) {
  if (!covered(a.R, a.V)) return cudaErrorInvalidValue;
  if (a.R == 0) return cudaSuccess;
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto* kernel = a.label_smoothing > 0 ? cross_entropy_kernel<T, true> : cross_entropy_kernel<T, false>;
    kernel<<<unsigned(a.R), kRowThreads, 0, stream>>>(a);
  });
  return cudaGetLastError();
}

cudaError_t cross_entropy_reduce(const CrossEntropyReduceArgs& a, cudaStream_t stream) {
  cross_entropy_reduce_kernel<<<1, kMaxThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t cross_entropy_backward(const CrossEntropyBackwardArgs& a, cudaStream_t stream) {
  if (!covered(a.R, a.V)) return cudaErrorInvalidValue;
  if (a.R == 0) return cudaSuccess;
  if (a.mean) cross_entropy_scale_kernel<<<1, kMaxThreads, 0, stream>>>(a);
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    cross_entropy_backward_kernel<T><<<unsigned(a.R), kRowThreads, 0, stream>>>(a);
  });
  return cudaGetLastError();
}

}  // namespace gpt2fast::cuda

// The C interface. The arguments are the fields of the structs.
extern "C" int gpt2fast_cross_entropy(const void* logits, const int64_t* targets, float* loss, float* lse, int64_t R,
                                      int64_t V, int64_t stride_logits_r, int64_t ignore_index, float label_smoothing,
                                      int64_t dtype, cudaStream_t stream) {
  using namespace gpt2fast;
  return cuda::cross_entropy({.logits = logits,
                              .targets = targets,
                              .loss = loss,
                              .lse = lse,
                              .R = R,
                              .V = V,
                              .stride_logits_r = stride_logits_r,
                              .ignore_index = ignore_index,
                              .label_smoothing = label_smoothing,
                              .dtype = DType(dtype)},
                             stream);
}

extern "C" int gpt2fast_cross_entropy_reduce(const float* loss, const int64_t* targets, float* out, int64_t R,
                                             int64_t ignore_index, int64_t mean, cudaStream_t stream) {
  using namespace gpt2fast;
  return cuda::cross_entropy_reduce(
      {.loss = loss, .targets = targets, .out = out, .R = R, .ignore_index = ignore_index, .mean = mean != 0}, stream);
}

extern "C" int gpt2fast_cross_entropy_backward(const float* dloss, const void* logits, const int64_t* targets,
                                               const float* lse, void* dlogits, float* scale, int64_t R, int64_t V,
                                               int64_t stride_dloss, int64_t stride_logits_r, int64_t ignore_index,
                                               float label_smoothing, int64_t mean, int64_t dtype,
                                               cudaStream_t stream) {
  using namespace gpt2fast;
  return cuda::cross_entropy_backward({.dloss = dloss,
                                       .logits = logits,
                                       .targets = targets,
                                       .lse = lse,
                                       .dlogits = dlogits,
                                       .scale = scale,
                                       .R = R,
                                       .V = V,
                                       .stride_dloss = stride_dloss,
                                       .stride_logits_r = stride_logits_r,
                                       .ignore_index = ignore_index,
                                       .label_smoothing = label_smoothing,
                                       .mean = mean != 0,
                                       .dtype = DType(dtype)},
                                      stream);
}
