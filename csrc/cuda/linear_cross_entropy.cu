// The step of linear_cross_entropy between its products: loss and lse of rows of logits, and the gradients of the
// logits, which are written over them. The formulas are those of cross_entropy.cu.
//
// A block has a row. It reads the row once for the sums and, if gradients are wanted, a second time to write them in
// its place. The rows of the buffer are padded to whole packs, so that every access has 128 bits, apart from that of
// the target's logit. The padding may hold anything. It becomes 0 where gradients are written, because the products
// that follow sum over it.
#include "cross_entropy.cuh"
#include "kernels.h"

namespace gpt2fast::cuda {
namespace {

// Blocks that must fit on a multiprocessor, which allows 64 registers a thread. The two passes together need more than
// 48.
constexpr int kResident = kRowsResident - 1;

// The column at which the whole sectors of a row of V columns end.
template <class T>
__device__ __forceinline__ int whole_sectors(int V) {
  return V - V % int(kSectorBytes / sizeof(T));
}

// The column at which this thread's pack after those sectors begins. The last thread of the block has the first pack.
template <class T>
__device__ __forceinline__ int pack_after(int end) {
  return end + int(kRowThreads - 1 - threadIdx.x) * kPack<T>;
}

// The sums of a row of V columns that begins at an aligned address, in every thread. The last pack may be partly
// padding.
template <bool kMean, class T>
__device__ __forceinline__ RowSums<kMean> sums_of_padded_row(const T* row, int V) {
  constexpr int kWidth = kPack<T>;
  RowSums<kMean> sums;
  const int end = whole_sectors<T>(V), last = pack_after<T>(end);
  walk_packs<kWidth>(0, end, [&](int column, auto tile) {
    float x[tile.kPacks][tile.kWidth];
    tile.read(row + column, x);
    sums.add(x);
  });
  if (last < V) {
    float x[kWidth];
    load<T, kWidth>(row + last, x);
#pragma unroll
    for (int i = 0; i < kWidth; ++i)
      if (last + i < V) sums.add({{x[i]}});
  }
  sums.merge();
  return sums;
}

// Writes the gradient over a row, and 0 to the columns from V to `padded`. Packs that are all padding are not read.
template <class T>
__device__ __forceinline__ void overwrite(T* row, int V, int padded, const LogitGradient& gradient) {
  constexpr int kWidth = kPack<T>;
  const int end = whole_sectors<T>(V);
  walk_packs<kWidth>(0, end, [&](int column, auto tile) {
    float x[tile.kPacks][tile.kWidth];
    tile.read(row + column, x);
    gradient.apply(x, column);
    tile.write(row + column, x);
  });
  const int column = pack_after<T>(end);
  if (column >= padded) return;
  float x[1][kWidth] = {};
  if (column < V) {
    load<T, kWidth>(row + column, x[0]);
    gradient.apply(x, column);
  }
#pragma unroll
  for (int i = 0; i < kWidth; ++i) x[0][i] = column + i < V ? x[0][i] : 0;
  store<T, kWidth>(row + column, x[0]);
}

template <class T, bool kSmoothing>
__global__ void __launch_bounds__(kRowThreads, kResident) loss_and_gradient_kernel(LinearCrossEntropyArgs a) {
  const int64_t r = blockIdx.x;
  const int V = int(a.V), padded = int(a.stride_logits_r);
  T* row = static_cast<T*>(a.logits) + r * a.stride_logits_r;
  const auto known = [&](int64_t target) { return 0 <= target && target < V; };
  float at_target[1] = {__int_as_float(0x7fffffff)};  // NaN, if the row has no such column
  if (threadIdx.x == 0 && known(a.targets[r])) load<T, 1>(row + a.targets[r], at_target);
  const RowSums<kSmoothing> sums = sums_of_padded_row<kSmoothing>(row, V);
  const int64_t target = a.targets[r];  // read again here, so that it takes no registers during the first pass
  const bool ignored = target == a.ignore_index;
  if (threadIdx.x == 0) {
    const float log_total = logf(sums.total);
    // The loss is a sum of differences from the greatest logit, which keep their digits however large the logits are.
    float loss = sums.peak - at_target[0] + log_total;
    if constexpr (kSmoothing) {
      const float e = a.label_smoothing;
      loss = (1 - e) * loss + e * (log_total - sums.differences / float(V));
    }
    a.loss[r] = ignored ? 0 : loss;
    a.lse[r] = sums.peak + log_total;
  }
  if (!a.gradients) return;
  if (ignored) {  // the gradient is 0, and the row is not read again
    walk_packs<kPack<T>>(0, padded, [&](int column, auto tile) {
      const float zeros[tile.kPacks][tile.kWidth] = {};
      tile.write(row + column, zeros);
    });
    return;
  }
  overwrite(row, V, padded,
            {.shift = sums.peak,
             .log2_total = log2f(sums.total),
             .scale = a.dloss ? a.dloss[r * a.stride_dloss] : 1,
             .uniform = kSmoothing ? a.label_smoothing / float(V) : 0,
             .share = kSmoothing ? 1 - a.label_smoothing : 1,
             .target = known(target) ? int(target) : -1});
}

// Whether the kernel covers these sizes. All rows must begin at multiples of 16 bytes, and the block must have a thread
// for each pack after the whole sectors of a row.
template <class T>
bool covered(const LinearCrossEntropyArgs& a) {
  return 0 <= a.V && a.V <= a.stride_logits_r && a.stride_logits_r <= kMostColumns && a.R <= INT32_MAX &&
         a.stride_logits_r - a.V < kWarp * kPack<T> && packed<T>({a.logits}, {a.stride_logits_r});
}

}  // namespace

cudaError_t linear_cross_entropy(const LinearCrossEntropyArgs& a, cudaStream_t stream) {
  cudaError_t status = cudaSuccess;
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (!covered<T>(a)) {
      status = cudaErrorInvalidValue;
    } else if (a.R > 0) {
      auto* kernel = a.label_smoothing > 0 ? loss_and_gradient_kernel<T, true> : loss_and_gradient_kernel<T, false>;
      kernel<<<unsigned(a.R), kRowThreads, 0, stream>>>(a);
      status = cudaGetLastError();
    }
  });
  return status;
}

}  // namespace gpt2fast::cuda

// The C interface. The arguments are the fields of the struct.
extern "C" int gpt2fast_linear_cross_entropy(void* logits, const int64_t* targets, float* loss, float* lse,
                                             const float* dloss, int64_t R, int64_t V, int64_t stride_logits_r,
                                             int64_t stride_dloss, int64_t ignore_index, float label_smoothing,
                                             int64_t gradients, int64_t dtype, cudaStream_t stream) {
  using namespace gpt2fast;
  return cuda::linear_cross_entropy({.logits = logits,
                                     .targets = targets,
                                     .loss = loss,
                                     .lse = lse,
                                     .dloss = dloss,
                                     .R = R,
                                     .V = V,
                                     .stride_logits_r = stride_logits_r,
                                     .stride_dloss = stride_dloss,
                                     .ignore_index = ignore_index,
                                     .label_smoothing = label_smoothing,
                                     .gradients = gradients != 0,
                                     .dtype = DType(dtype)},
                                    stream);
}
