// out = softmax(scale q k^T + bias) v over the keys that each query sees, and lse = log sum exp(scores). The matrix of
// scores is never in memory, only a tile of it in registers (FlashAttention-2, Dao, arXiv:2307.08691).
//
// A block has a tile of queries of one head, 16 for each warp, and loops over tiles of the keys that they see. In 16
// bits, a tile is copied to shared memory while the tile before is computed. For each query a warp keeps the greatest
// score so far (peak), the sum of e^(score - peak) (total), and the sum of e^(score - peak) times the value (out). A
// greater peak rescales both sums. All of this has the layout of C in mma.cuh: a query is a row, whose keys or columns
// of out are spread over 4 lanes.
//
// The floor: q, k, v and out are moved once each, and each pair of a query and a key that it sees takes two products of
// D multiplications. docs/kernels.md counts what the kernel moves and multiplies; docs/how/attention.md explains it.
#include "attention.cuh"
#include "kernels.h"

namespace gpt2fast::cuda {
namespace {

template <class T, int kD, bool kExtras>
struct Sizes {
  static constexpr bool kWide = kPlanes<T> > 1;  // float32
  static constexpr int kWarps = kWide && kD > 128 ? 2 : 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kQueries = kWarps * kMma;                                    // queries of a block
  static constexpr int kKeys = kWide ? (kD > 64 ? 16 : 32) : (kD > 128 ? 32 : 64);  // keys of a tile
  static constexpr int kColumns = kWide || kExtras ? (kD < 128 ? kD : 128) : kD;    // columns of out of a block
  static constexpr int kParts = kD / kColumns;               // blocks that share the columns of the same queries
  static constexpr int kStages = kWide ? 1 : 2;              // tiles in shared memory at a time
  static constexpr bool kHoldQueries = !kWide && kD <= 128;  // queries are in registers, else in shared memory
  // The number of blocks that must fit on a multiprocessor. It limits the registers that the compiler may use.
  static constexpr int kBlocks = kWide || kD > 128 ? 1 : kD > 64 || kIsBlackwell ? 2 : kD > 32 ? 3 : 4;
  using Queries = Tile<T, kD, kQueries>;
  using Keys = Tile<T, kD, kKeys>;
  using Values = Tile<T, kColumns, kKeys>;
  static constexpr int kStageBytes = Keys::kBytes + Values::kBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + (kHoldQueries ? 0 : Queries::kBytes);
  static_assert(kSharedBytes <= kMostShared);
};

// kAligned: rows are read and written 16 bytes at a time. kExtras: there may be a bias or dropout.
template <class T, int kD, bool kAligned, bool kExtras>
__global__ void __launch_bounds__(Sizes<T, kD, kExtras>::kThreads, kAligned ? Sizes<T, kD, kExtras>::kBlocks : 1)
    attention_kernel(AttentionArgs a, int tiles) {
  using Size = Sizes<T, kD, kExtras>;
  constexpr int kKeys = Size::kKeys, kStages = Size::kStages, kThreads = Size::kThreads, kQueries = Size::kQueries;
  constexpr int kColumns = Size::kColumns;
  constexpr int kSteps = kD / kMma;  // steps of 16 columns in the product q k^T
  constexpr uint64_t kAllBits = ~uint64_t(0) >> (64 - kKeys);
  extern __shared__ __align__(128) uint16_t memory[];
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(memory));
  const auto tile_k = [&](int stage) { return typename Size::Keys{shared + stage * Size::kStageBytes}; };
  const auto tile_v = [&](int stage) { return typename Size::Values{tile_k(stage).start + Size::Keys::kBytes}; };
  // Queries that will be held in registers are first copied to the place of the second stage.
  const typename Size::Queries tile_q{tile_k(Size::kHoldQueries ? 1 : kStages).start};

  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const int part = blockIdx.x % Size::kParts, block = blockIdx.x / Size::kParts, column = part * kColumns;
  const int D = int(a.D), H = int(a.H), head = block / tiles, b = head / H, h = head % H;
  const Sight sight(a, b);
  // The last queries of a causal head see the most keys. Their blocks start first, so that short ones run at the end.
  const int first = (tiles - 1 - block % tiles) * kQueries, first_of_warp = first + warp * kMma;
  const int last = min(first + kQueries, sight.queries) - 1;
  const T* q = head_of<T>(a.q, a.stride_q, b, h) + first * a.stride_q[1];
  const T* k = head_of<T>(a.k, a.stride_k, b, h);
  const T* v = head_of<T>(a.v, a.stride_v, b, h) + column;
  const int begin = max(0, first + sight.shift - sight.window + 1) / kKeys * kKeys;
  const int end = sight.causal ? min(sight.keys, last + sight.shift + 1) : sight.keys;

  const auto copy_keys = [&](int stage, int key, uint64_t bits) {
    tile_k(stage).template copy<kAligned, kThreads>(k + key * a.stride_k[1], a.stride_k[1], D, bits);
    tile_v(stage).template copy<kAligned, kThreads>(v + key * a.stride_v[1], a.stride_v[1], D - column, bits);
  };
  tile_q.template copy<kAligned, kThreads>(q, a.stride_q[1], D, sight.of_queries<kQueries>(first));
  uint64_t bits = 0;
  if (kStages > 1 && begin < end) {
    bits = sight.of_keys<kKeys>(begin);
    copy_keys(0, begin, bits);
  }
  FragmentA<T> held[Size::kHoldQueries ? kSteps : 1];
  if constexpr (Size::kHoldQueries) {
    wait_for_copies();
    __syncthreads();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) tile_q.load_a(held[step], warp * kMma, step);
  }

  float out[kColumns / kHalf][4] = {};
  float peak[2] = {-INFINITY, -INFINITY}, total[2] = {};  // of rows g and g + 8; total has only this lane's columns
  const uint64_t seed = kExtras && a.dropout_p > 0 ? *a.seed : 0;
  const T* bias = static_cast<const T*>(a.bias) + b * a.stride_bias[0] + h * a.stride_bias[1];

  int stage = 0;
  for (int key = begin; key < end; key += kKeys) {
    uint64_t next_bits = 0;
    if constexpr (kStages > 1) {
      wait_for_copies();
      __syncthreads();  // this tile has arrived, and no warp still reads the tile before
      if (key + kKeys < end) {
        next_bits = sight.of_keys<kKeys>(key + kKeys);
        copy_keys(stage ^ 1, key + kKeys, next_bits);
      }
    } else {
      bits = sight.of_keys<kKeys>(key);
      __syncthreads();
      copy_keys(0, key, bits);
      wait_for_copies();
      __syncthreads();
    }

    // Element e of score[n] belongs to query first_of_warp + g + 8 (e / 2) and to key + 8 n + 2t + e % 2.
    float score[kKeys / kHalf][4] = {};
#pragma unroll Size::kHoldQueries ? kSteps : 1
    for (int step = 0; step < kSteps; ++step) {
      FragmentA<T> query;
      if constexpr (!Size::kHoldQueries) tile_q.load_a(query, warp * kMma, step);
#pragma unroll
      for (int n = 0; n < kKeys / kHalf; n += 2) {
        FragmentA<T> keys;
        tile_k(stage).load_b_of_rows(keys, n * kHalf, step);
        mma<T>(score[n], score[n + 1], Size::kHoldQueries ? held[step * Size::kHoldQueries] : query, keys);
      }
    }
    const bool all = bits == kAllBits && sight.all(first_of_warp, kMma, key, kKeys);
    const uint64_t mine = bits >> 2 * t;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = first_of_warp + g + 8 * r;
      const Sight::Span span = sight.span(query, key + 2 * t);
#pragma unroll
      for (int n = 0; n < kKeys / kHalf; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int local = n * kHalf + e;
          float& s = score[n][2 * r + e];
          s = __fmul_rn(s, a.scale);
          if (kExtras && a.bias && query < sight.queries && key + 2 * t + local < sight.keys)
            s += widen(bias[query * a.stride_bias[2] + (key + 2 * t + local) * a.stride_bias[3]]);
          if (!all && !((mine >> local & 1) && span.has(local))) s = -INFINITY;
        }
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = peak[r];
#pragma unroll
      for (int n = 0; n < kKeys / kHalf; ++n) highest = fmaxf(highest, fmaxf(score[n][2 * r], score[n][2 * r + 1]));
      highest = max_of_row(highest);
      // A row that has seen no key yet is shifted by 0, since (-inf) - (-inf) is NaN. The shift is subtracted before
      // the multiplication by log2(e), because the difference of two close numbers is exact, however large they are.
      const float shift = highest == -INFINITY ? 0 : highest;
      const float shrink = exp2_fast((peak[r] - shift) * kLog2E);
      peak[r] = highest;
      total[r] *= shrink;
#pragma unroll
      for (int n = 0; n < kColumns / kHalf; ++n) out[n][2 * r] *= shrink, out[n][2 * r + 1] *= shrink;
#pragma unroll
      for (int n = 0; n < kKeys / kHalf; ++n)
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          score[n][e] = exp2_fast((score[n][e] - shift) * kLog2E);
          total[r] += score[n][e];
        }
    }
    if (kExtras && a.dropout_p > 0) {
#pragma unroll
      for (int n = 0; n < kKeys / kHalf; ++n) {
        bool keeps[4];
        draw(keeps, seed, uint64_t(head) * sight.queries + first_of_warp + g, key + n * kHalf, a.dropout_p);
#pragma unroll
        for (int e = 0; e < 4; ++e) score[n][e] = keeps[e] ? score[n][e] : 0;
      }
    }

#pragma unroll
    for (int step = 0; step < kKeys / kMma; ++step) {
      FragmentA<T> p;
      as_operand<T>(score[2 * step], score[2 * step + 1], p);
#pragma unroll
      for (int n = 0; n < kColumns / kHalf; n += 2) {
        FragmentA<T> values;
        tile_v(stage).load_b(values, step * kMma, n / 2);
        mma<T>(out[n], out[n + 1], p, values);
      }
    }
    bits = next_bits;
    if constexpr (kStages > 1) stage ^= 1;
  }

  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = first_of_warp + g + 8 * r;
    const float sum = sum_of_row(total[r]);
    factor[r] = sum > 0 ? 1 / sum : 0;
    if (kExtras && a.dropout_p > 0) factor[r] = factor[r] / (1 - a.dropout_p);
    if (part == 0 && t == 0 && query < sight.queries)
      a.lse[int64_t(head) * sight.queries + query] = sum > 0 ? peak[r] + logf(sum) : kLowest;
  }
  __syncthreads();  // no warp reads tiles any more: their memory becomes scratch
  T* to = static_cast<T*>(a.out) + ((int64_t(b) * sight.queries + first_of_warp) * H + h) * D + column;
  write_rows<T, kColumns, kAligned>(out, factor, shared + warp * Tile<T, kColumns, kMma>::kBytes, to, int64_t(H) * D,
                                    D - column, sight.queries - first_of_warp);
}

template <class T, int kD, bool kAligned, bool kExtras>
cudaError_t launch(const AttentionArgs& a, cudaStream_t stream) {
  using Size = Sizes<T, kD, kExtras>;
  auto* kernel = attention_kernel<T, kD, kAligned, kExtras>;
  const int64_t tiles = (a.T + Size::kQueries - 1) / Size::kQueries, blocks = tiles * a.B * a.H * Size::kParts;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Size::kSharedBytes);
  if (status != cudaSuccess) return status;
  kernel<<<unsigned(blocks), Size::kThreads, Size::kSharedBytes, stream>>>(a, int(tiles));
  return cudaGetLastError();
}

}  // namespace

cudaError_t attention(const AttentionArgs& a, cudaStream_t stream) {
  if (a.D < 1 || a.D > kLargestHead || a.T > kLongest || a.S > kLongest) return cudaErrorInvalidValue;
  if (a.B * a.T * a.H == 0) return cudaSuccess;
  cudaError_t status = cudaSuccess;
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool aligned = chunked<T>(a.D, {a.q, a.k, a.v, a.out}, {a.stride_q, a.stride_k, a.stride_v});
    const bool extras = a.bias || a.dropout_p > 0;
    if (aligned && !extras) {
      with_head_size<32, 64, 80, 96, 128, 256>(
          a.D, [&](auto size) { status = launch<T, size.value, true, false>(a, stream); });
    } else {
      with_head_size<64, 128, 256>(a.D, [&](auto size) {
        status = aligned ? launch<T, size.value, true, true>(a, stream) : launch<T, size.value, false, true>(a, stream);
      });
    }
  });
  return status;
}

}  // namespace gpt2fast::cuda

// The C interface. The arguments are the fields of the struct.
extern "C" int gpt2fast_attention(const void* q, const void* k, const void* v, const bool* mask, const void* bias,
                                  void* out, float* lse, int64_t B, int64_t T, int64_t S, int64_t H, int64_t D,
                                  int64_t stride_q_b, int64_t stride_q_t, int64_t stride_q_h, int64_t stride_k_b,
                                  int64_t stride_k_s, int64_t stride_k_h, int64_t stride_v_b, int64_t stride_v_s,
                                  int64_t stride_v_h, int64_t stride_mask_b, int64_t stride_bias_b,
                                  int64_t stride_bias_h, int64_t stride_bias_t, int64_t stride_bias_s, int64_t window,
                                  int64_t causal, float scale, float dropout_p, const int64_t* seed, int64_t dtype,
                                  cudaStream_t stream) {
  using namespace gpt2fast;
  return cuda::attention({.q = q,
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
                         stream);
}
