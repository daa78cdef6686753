// The gradients of attention. The probabilities are computed again from lse, tile by tile:
//
//   p = e^(scale q k^T + bias - lse)      dp = dout v^T      delta = rowsum(dout out)      ds = p (dp - delta)
//   dq = scale ds k                       dk = scale ds^T q                                dv = p^T dout
//
// Dropout is applied to dp, and to the p of dv.
//
// 1. attention_delta_kernel writes delta.
// 2. attention_backward_kernel runs twice. A block holds a tile of rows and loops over tiles of columns. In the first
//    run, rows are queries and columns are keys: it writes dq and excess, the log2 of what a query's p sum to. In the
//    second run, rows are keys and columns are queries: it writes dk and dv.
// 3. attention_backward_bias_kernel writes dbias, if there is a bias: ds summed where bias broadcasts.
//
// There are no atomics, so that the gradients have the same bits in every run. The price is that scores and dp are
// computed twice. docs/kernels.md counts the bytes and products.
#include "attention_backward.cuh"
#include "attention_backward_bias.cuh"
#include "kernels.h"

namespace gpt2fast::cuda {
namespace {

using namespace attention_backward_parts;

// delta = rowsum(dout out). A warp has one query of one head.
constexpr int kDeltaWarps = 8;
template <class T>
__global__ void __launch_bounds__(kDeltaWarps* kWarp) attention_delta_kernel(AttentionBackwardArgs a) {
  const AttentionArgs& forward = a.attention;
  const int64_t row = int64_t(blockIdx.x) * kDeltaWarps + threadIdx.x / kWarp;  // (b T + t) H + h
  if (row >= forward.B * forward.T * forward.H) return;
  const int64_t h = row % forward.H, t = row / forward.H % forward.T, b = row / forward.H / forward.T;
  const T* dout = static_cast<const T*>(a.dout) + b * a.stride_dout[0] + t * a.stride_dout[1] + h * a.stride_dout[2];
  const T* out = static_cast<const T*>(forward.out) + b * a.stride_out[0] + t * a.stride_out[1] + h * a.stride_out[2];
  float sum = 0;
  for (int d = threadIdx.x % kWarp; d < forward.D; d += kWarp) sum += widen(dout[d]) * widen(out[d]);
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) a.delta[(b * forward.H + h) * forward.T + t] = sum;
}

template <class T, int kD, bool kAligned, bool kExtras, bool kKeyRows>
__global__ void __launch_bounds__(Sizes<T, kD>::kThreads, Sizes<T, kD>::kBlocks)
    attention_backward_kernel(const __grid_constant__ AttentionBackwardArgs a, int tiles) {
  using Size = Sizes<T, kD>;
  constexpr int kColumns = Size::kColumns, kRows = Size::kRows, kOut = Size::template kOut<kKeyRows>;
  constexpr int kParts = Size::template kParts<kKeyRows>;
  extern __shared__ __align__(128) uint16_t memory[];
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(memory));
  const int part_of_out = blockIdx.x % kParts, block = blockIdx.x / kParts;
  const Head<T, kD, kAligned, kExtras, kKeyRows> head(a, block / tiles, shared);
  const Sight& sight = head.sight;
  const int warp = threadIdx.x / kWarp, g = head.g, D = int(a.attention.D);
  const int tile = block % tiles, first = (kKeyRows ? tile : tiles - 1 - tile) * kRows, row = first + warp * kMma;
  const int last = min(first + kRows, kKeyRows ? sight.keys : sight.queries) - 1;

  // The columns [begin, end) that some row of this block meets.
  int64_t begin = 0, end = kKeyRows ? sight.queries : sight.keys;
  if constexpr (kKeyRows) {
    if (sight.causal) begin = max(begin, int64_t(first) - sight.shift);
    end = min(end, int64_t(last) - sight.shift + sight.window);
  } else {
    begin = max(begin, int64_t(first) + sight.shift - sight.window + 1);
    if (sight.causal) end = min(end, int64_t(last) + sight.shift + 1);
  }
  begin = begin / kColumns * kColumns;

  const uint64_t row_bits = head.copy_rows(first);
  uint64_t bits = 0;
  if (Size::kStages > 1 && begin < end) bits = head.copy_columns(0, int(begin));
  wait_for_copies();
  __syncthreads();
  typename decltype(head)::Held held;
  head.hold(held, warp * kMma);
  typename decltype(head)::Row known = {};
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    known.there[r] = row_bits >> (warp * kMma + g + 8 * r) & 1;
    if (!kKeyRows && known.there[r])
      known.lse[r] = head.statistics[0][row + g + 8 * r], known.delta[r] = head.statistics[1][row + g + 8 * r];
  }
  const bool all_rows = __all_sync(kAllLanes, known.there[0] && known.there[1]);

  float sum_1[kOut / kHalf][4] = {};                 // dq or dk
  float sum_2[kKeyRows ? kOut / kHalf : 2][4] = {};  // dv
  float total[2] = {};                               // the sums of p over this lane's columns
  int stage = 0;
  for (int column = int(begin); column < end; column += kColumns) {
    uint64_t next_bits = 0;
    if constexpr (Size::kStages > 1) {
      wait_for_copies();
      __syncthreads();  // this tile has arrived, and no warp still reads the tile before
      if (column + kColumns < end) next_bits = head.copy_columns(stage ^ 1, column + kColumns);
    } else {
      __syncthreads();
      bits = head.copy_columns(0, column);
      wait_for_copies();
      __syncthreads();
    }
    const bool full = kKeyRows ? column + kColumns <= sight.queries : bits == head.kAllBits;
    const bool all = all_rows && full &&
                     (kKeyRows ? sight.all(column, kColumns, row, kMma) : sight.all(row, kMma, column, kColumns));
    // 16 columns at a time are one A of the second product. Unrolled, the loop would spill registers.
#pragma unroll 1
    for (int part = 0; part < kColumns; part += kMma) {
      float dropped[2][4], ds[2][4], p[2][4];
      head.probabilities(dropped, ds, p, held, known, stage, warp * kMma, row, column, part, bits, all);
      // sum += numbers times the tile of tensor 1 or 2.
      const auto add = [&](auto& sum, const float (&numbers)[2][4], int tensor) {
        FragmentA<T> operand, columns;
        as_operand<T>(numbers[0], numbers[1], operand);
#pragma unroll
        for (int n = 0; n < kOut / kHalf; n += 2) {
          head.columns(stage, tensor).load_b(columns, part, part_of_out * (kOut / kMma) + n / 2);
          mma<T>(sum[n], sum[n + 1], operand, columns);
        }
      };
      add(sum_1, ds, 1);
      if constexpr (kKeyRows) {
        add(sum_2, dropped, 2);
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) total[e / 2] += p[0][e] + p[1][e];
      }
    }
    bits = next_bits;
    if constexpr (Size::kStages > 1) stage ^= 1;
  }

  // The p of a query would sum to 1 if lse were exact. Where scores are large, lse has no digits left for the log of
  // the sum, and p is off by a common factor. Dividing by the sum of p corrects dq. The pass over keys subtracts the
  // sum's log2, the excess, in the exponent.
  float factor[2] = {a.attention.scale, a.attention.scale};
  if constexpr (!kKeyRows) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = sum_of_row(total[r]), some = sum > 0 ? sum : 1;
      factor[r] = a.attention.scale / some;
      const int query = row + g + 8 * r;
      if (part_of_out == 0 && head.t == 0 && query < sight.queries)
        a.excess[int64_t(head.head) * sight.queries + query] = log2f(some);
    }
  }
  __syncthreads();  // no warp reads tiles any more: their memory becomes scratch
  const int length = kKeyRows ? sight.keys : sight.queries, column = part_of_out * kOut;
  const int64_t at = ((int64_t(head.b) * length + row) * a.attention.H + head.h) * D + column;
  const int64_t stride = a.attention.H * D;
  const uint32_t scratch = shared + warp * Tile<T, kOut, kMma>::kBytes;
  write_rows<T, kOut, kAligned>(sum_1, factor, scratch, static_cast<T*>(kKeyRows ? a.dk : a.dq) + at, stride,
                                D - column, length - row);
  if constexpr (kKeyRows) {
    const float one[2] = {1, 1};
    __syncwarp();
    write_rows<T, kOut, kAligned>(sum_2, one, scratch, static_cast<T*>(a.dv) + at, stride, D - column, length - row);
  }
}

template <class Kernel, class... Rest>
cudaError_t launch(Kernel* kernel, int64_t blocks, int threads, int bytes, cudaStream_t stream, Rest... rest) {
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  if (blocks == 0) return cudaSuccess;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  kernel<<<unsigned(blocks), threads, bytes, stream>>>(rest...);
  return cudaGetLastError();
}

template <class T, int kD, bool kAligned, bool kExtras>
cudaError_t launch_all(const AttentionBackwardArgs& a, cudaStream_t stream) {
  using Size = Sizes<T, kD>;
  const AttentionArgs& forward = a.attention;
  const auto tiles = [](int64_t length, int size) { return (length + size - 1) / size; };
  const int64_t heads = forward.B * forward.H, of_queries = tiles(forward.T, Size::kRows),
                of_keys = tiles(forward.S, Size::kRows);
  cudaError_t status =
      launch(attention_delta_kernel<T>, tiles(heads * forward.T, kDeltaWarps), kDeltaWarps * kWarp, 0, stream, a);
  if (status == cudaSuccess)
    status = launch(attention_backward_kernel<T, kD, kAligned, kExtras, false>,
                    of_queries * heads * Size::template kParts<false>, Size::kThreads, Size::kSharedBytes, stream, a,
                    int(of_queries));
  if (status == cudaSuccess)
    status =
        launch(attention_backward_kernel<T, kD, kAligned, kExtras, true>, of_keys * heads * Size::template kParts<true>,
               Size::kThreads, Size::kSharedBytes, stream, a, int(of_keys));
  if constexpr (kExtras) {
    if (status == cudaSuccess && forward.bias) {
      const auto size = [&](int axis, int64_t whole) { return int(forward.stride_bias[axis] == 0 ? 1 : whole); };
      const int4 sizes = {size(0, forward.B), size(1, forward.H), size(2, forward.T), size(3, forward.S)};
      const int64_t of_columns = tiles(forward.S, Size::kColumns);
      const int64_t blocks =
          int64_t(sizes.x) * sizes.y * (sizes.z == 1 ? 1 : of_queries) * (sizes.w == 1 ? 1 : of_columns);
      status = launch(attention_backward_bias_kernel<T, kD, kAligned>, blocks, Size::kThreads, Size::kSharedBytes,
                      stream, a, int(of_queries), int(of_columns), sizes);
    }
  }
  return status;
}

}  // namespace

cudaError_t attention_backward(const AttentionBackwardArgs& a, cudaStream_t stream) {
  const AttentionArgs& forward = a.attention;
  if (forward.D < 1 || forward.D > kLargestHead || forward.T > kLongest || forward.S > kLongest)
    return cudaErrorInvalidValue;
  if (forward.B * forward.T * forward.H * forward.S == 0)
    return cudaErrorInvalidValue;  // no query sees a key: the caller fills the gradients with zeros
  cudaError_t status = cudaSuccess;
  with_dtype(forward.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool aligned = chunked<T>(forward.D, {forward.q, forward.k, forward.v, a.dout, a.dq, a.dk, a.dv},
                                    {forward.stride_q, forward.stride_k, forward.stride_v, a.stride_dout});
    const bool extras = forward.bias || forward.dropout_p > 0;
    if (aligned && !extras) {
      with_head_size<64, 96, 128, 256>(forward.D,
                                       [&](auto size) { status = launch_all<T, size.value, true, false>(a, stream); });
    } else {
      with_head_size<64, 128, 256>(forward.D, [&](auto size) {
        status = aligned ? launch_all<T, size.value, true, true>(a, stream)
                         : launch_all<T, size.value, false, true>(a, stream);
      });
    }
  });
  return status;
}

}  // namespace gpt2fast::cuda

// The C interface. The arguments are the fields of the structs.
extern "C" int gpt2fast_attention_backward(
    const void* dout, void* dq, void* dk, void* dv, void* dbias, float* delta, float* excess, int64_t stride_dout_b,
    int64_t stride_dout_t, int64_t stride_dout_h, int64_t stride_out_b, int64_t stride_out_t, int64_t stride_out_h,
    const void* q, const void* k, const void* v, const bool* mask, const void* bias, void* out, float* lse, int64_t B,
    int64_t T, int64_t S, int64_t H, int64_t D, int64_t stride_q_b, int64_t stride_q_t, int64_t stride_q_h,
    int64_t stride_k_b, int64_t stride_k_s, int64_t stride_k_h, int64_t stride_v_b, int64_t stride_v_s,
    int64_t stride_v_h, int64_t stride_mask_b, int64_t stride_bias_b, int64_t stride_bias_h, int64_t stride_bias_t,
    int64_t stride_bias_s, int64_t window, int64_t causal, float scale, float dropout_p, const int64_t* seed,
    int64_t dtype, cudaStream_t stream) {
  using namespace gpt2fast;
  return cuda::attention_backward(
      {.attention = {.q = q,
                     .k = k,
                     .v = v,
                     .mask = mask,
                     .bias = bias,
                     .out = out,
                     .lse = lse,
                     .B = B,
                     .T = T,
                     .S = S,
                     .H = H,
                     .D = D,
                     .stride_q = {stride_q_b, stride_q_t, stride_q_h},
                     .stride_k = {stride_k_b, stride_k_s, stride_k_h},
                     .stride_v = {stride_v_b, stride_v_s, stride_v_h},
                     .stride_mask_b = stride_mask_b,
                     .stride_bias = {stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s},
                     .window = window,
                     .causal = causal != 0,
                     .scale = scale,
                     .dropout_p = dropout_p,
                     .seed = seed,
                     .dtype = DType(dtype)},
       .dout = dout,
       .dq = dq,
       .dk = dk,
       .dv = dv,
       .dbias = dbias,
       .delta = delta,
       .excess = excess,
       .stride_dout = {stride_dout_b, stride_dout_t, stride_dout_h},
       .stride_out = {stride_out_b, stride_out_t, stride_out_h}},
      stream);
}
