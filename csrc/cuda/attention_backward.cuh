// What the kernels of attention's gradients share. From tiles in shared memory, they compute p and ds (see
// attention_backward.cu) of 16 rows and 16 columns at a time.
#pragma once
#include "attention.cuh"

namespace gpt2fast::cuda {
namespace attention_backward_parts {

constexpr int kStatistics = 3;  // numbers kept for each query: lse, delta, excess

template <class T, int kD>
struct Sizes {
  static constexpr bool kWide = kPlanes<T> > 1;  // float32
  static constexpr int kWarps = !kWide ? 4 : kD > 128 ? 1 : kD > 64 ? 2 : 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRows = kWarps * kMma;                                      // rows that a block holds
  static constexpr int kColumns = kWide ? 16 : kD > 128 ? 16 : kD > 64 ? 32 : 64;  // columns of a tile
  // kOut: columns of the gradients that a block computes. kParts: blocks that share the columns of the same rows, for
  // lack of registers. If rows are keys, there are two gradients.
  template <bool kKeyRows>
  static constexpr int kOut = kWide && kKeyRows && kD > 64 ? (kD > 128 ? 64 : kD / 2)
                              : kD < 128                   ? kD
                                                           : 128;
  template <bool kKeyRows>
  static constexpr int kParts = kD / kOut<kKeyRows>;
  // The number of blocks that must fit on a multiprocessor. By default the compiler aims at more and spills registers.
  static constexpr int kBlocks = !kWide && kD <= 64 && !kIsBlackwell ? 3 : 1;
  static constexpr int kStages = kWide ? 1 : 2;          // tiles in shared memory at a time
  static constexpr bool kHoldRows = !kWide && kD <= 64;  // rows are in registers, else in shared memory
  using Rows = Tile<T, kD, kRows>;
  using Columns = Tile<T, kD, kColumns>;
  static constexpr int kStatisticsBytes = kStatistics * kColumns * sizeof(float);
  static constexpr int kStageBytes = 2 * Columns::kBytes + kStatisticsBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + (kHoldRows ? 0 : 2 * Rows::kBytes);
  static_assert(kSharedBytes <= kMostShared);
};

// One head of one batch row, as a block sees it. Rows that are queries have q as tensor 1 and dout as tensor 2; rows
// that are keys have k and v. The columns have the other two. So the product of both tensors 1 is the scores, and the
// product of both tensors 2 is dp.
template <class T, int kD, bool kAligned, bool kExtras, bool kKeyRows>
struct Head {
  using Size = Sizes<T, kD>;
  static constexpr int kSteps = kD / kMma;
  static constexpr uint64_t kAllBits = ~uint64_t(0) >> (64 - Size::kColumns);

  const AttentionBackwardArgs& a;
  const Sight sight;
  const int head, b, h, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  uint32_t shared;
  uint64_t seed;
  const T* bias;
  const float* statistics[kStatistics];  // lse, delta and excess of the head's queries
  float keep_factor;

  __device__ __forceinline__ Head(const AttentionBackwardArgs& args, int head, uint32_t shared)
      : a(args),
        sight(args.attention, head / int(args.attention.H)),
        head(head),
        b(head / int(args.attention.H)),
        h(head % int(args.attention.H)),
        shared(shared) {
    const AttentionArgs& forward = a.attention;
    seed = kExtras && forward.dropout_p > 0 ? *forward.seed : 0;
    keep_factor = 1 / (1 - forward.dropout_p);
    bias = static_cast<const T*>(forward.bias) + b * forward.stride_bias[0] + h * forward.stride_bias[1];
    const int64_t row = int64_t(head) * sight.queries;
    statistics[0] = forward.lse + row, statistics[1] = a.delta + row, statistics[2] = a.excess + row;
  }

  // The tiles in shared memory. Columns have one tile for each stage and tensor. Rows have tiles of their own, unless
  // registers hold them: they are then first copied to the place of the second stage.
  __device__ __forceinline__ typename Size::Columns columns(int stage, int tensor) const {
    return {shared + stage * Size::kStageBytes + (tensor - 1) * Size::Columns::kBytes};
  }
  __device__ __forceinline__ typename Size::Rows rows(int tensor) const {
    const uint32_t start = columns(Size::kHoldRows ? 1 : Size::kStages, 1).start;
    return {start + (tensor - 1) * Size::Rows::kBytes};
  }
  __device__ __forceinline__ uint32_t statistics_of(int stage) const {
    return columns(stage, 1).start + 2 * Size::Columns::kBytes;
  }

  template <class Tiles>
  __device__ __forceinline__ void copy_queries(Tiles q, Tiles dout, int query, uint64_t bits) const {
    const AttentionArgs& forward = a.attention;
    q.template copy<kAligned, Size::kThreads>(
        head_of<T>(forward.q, forward.stride_q, b, h) + query * forward.stride_q[1], forward.stride_q[1],
        int(forward.D), bits);
    dout.template copy<kAligned, Size::kThreads>(head_of<T>(a.dout, a.stride_dout, b, h) + query * a.stride_dout[1],
                                                 a.stride_dout[1], int(forward.D), bits);
  }
  template <class Tiles>
  __device__ __forceinline__ void copy_keys(Tiles k, Tiles v, int key, uint64_t bits) const {
    const AttentionArgs& forward = a.attention;
    k.template copy<kAligned, Size::kThreads>(head_of<T>(forward.k, forward.stride_k, b, h) + key * forward.stride_k[1],
                                              forward.stride_k[1], int(forward.D), bits);
    v.template copy<kAligned, Size::kThreads>(head_of<T>(forward.v, forward.stride_v, b, h) + key * forward.stride_v[1],
                                              forward.stride_v[1], int(forward.D), bits);
  }
  __device__ __forceinline__ uint64_t copy_rows(int first) const {
    const uint64_t bits = kKeyRows ? sight.of_keys<Size::kRows>(first) : sight.of_queries<Size::kRows>(first);
    if constexpr (kKeyRows) {
      copy_keys(rows(1), rows(2), first, bits);
    } else {
      copy_queries(rows(1), rows(2), first, bits);
    }
    return bits;
  }
  __device__ __forceinline__ uint64_t copy_columns(int stage, int first) const {
    const uint64_t bits = kKeyRows ? sight.of_queries<Size::kColumns>(first) : sight.of_keys<Size::kColumns>(first);
    if constexpr (kKeyRows) {
      copy_queries(columns(stage, 1), columns(stage, 2), first, bits);
#pragma unroll
      for (int statistic = 0; statistic < kStatistics; ++statistic)
        for (int i = threadIdx.x; i < Size::kColumns; i += Size::kThreads) {
          const float x = first + i < sight.queries ? statistics[statistic][first + i] : 0;
          const uint32_t to = statistics_of(stage) + (statistic * Size::kColumns + i) * sizeof(float);
          asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory");
        }
    } else {
      copy_keys(columns(stage, 1), columns(stage, 2), first, bits);
    }
    return bits;
  }

  // The 16 rows of this warp, from `row` of the tile on, in the layout of A.
  struct Held {
    FragmentA<T> of[2][Size::kHoldRows ? kSteps : 1];
  };
  __device__ __forceinline__ void hold(Held& held, int row) const {
    if constexpr (Size::kHoldRows) {
#pragma unroll
      for (int tensor = 0; tensor < 2; ++tensor)
#pragma unroll
        for (int step = 0; step < kSteps; ++step) rows(tensor + 1).load_a(held.of[tensor][step], row, step);
    }
  }

  // What a lane knows of its rows g and g + 8: whether they exist and, if they are queries, their statistics.
  struct Row {
    bool there[2];
    float lse[2], delta[2], excess[2];
  };

  // Computes p, with dropout (`dropped`) and without (`p`), and ds, of the warp's 16 rows and the tile's 16 columns
  // from `part` on. `row` and `column` are the positions of the warp's first row and of the tile's first column. If the
  // columns are keys, `bits` says which of them count. `all`: every row sees every column.
  __device__ __forceinline__ void probabilities(float (&dropped)[2][4], float (&ds)[2][4], float (&p)[2][4], Held& held,
                                                const Row& known, int stage, int row_of_tile, int row, int column,
                                                int part, uint64_t bits, bool all) const {
    const AttentionArgs& forward = a.attention;
    float score[2][4] = {}, dp[2][4] = {};
#pragma unroll Size::kHoldRows ? kSteps : 1
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int tensor = 0; tensor < 2; ++tensor) {
        FragmentA<T> of_row, of_columns;
        if constexpr (!Size::kHoldRows) rows(tensor + 1).load_a(of_row, row_of_tile, step);
        columns(stage, tensor + 1).load_b_of_rows(of_columns, part, step);
        auto& sum = tensor ? dp : score;
        mma<T>(sum[0], sum[1], Size::kHoldRows ? held.of[tensor][step * Size::kHoldRows] : of_row, of_columns);
      }
    const uint64_t mine = bits >> part >> 2 * t;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      bool keeps[4] = {true, true, true, true};
      if (kExtras && forward.dropout_p > 0) {
        const int key = kKeyRows ? row + g : column + part + n * kHalf;
        const int query = kKeyRows ? column + part + n * kHalf + 2 * t : row + g;
        const uint64_t number = uint64_t(head) * sight.queries + query;
        kKeyRows ? draw_of_keys(keeps, seed, number, key, forward.dropout_p)
                 : draw(keeps, seed, number, key, forward.dropout_p);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = e / 2, local = n * kHalf + e % 2, own = row + g + 8 * r, other = column + part + 2 * t;
        const int key = kKeyRows ? own : other + local, query = kKeyRows ? other + local : own;
        float lse = known.lse[r], delta = known.delta[r], excess = known.excess[r];
        if constexpr (kKeyRows) {
          const uint32_t at = statistics_of(stage) + (part + 2 * t + local) * 4;
          asm volatile("ld.shared.f32 %0, [%1];" : "=f"(lse) : "r"(at) : "memory");
          asm volatile("ld.shared.f32 %0, [%1];" : "=f"(delta) : "r"(at + Size::kColumns * 4) : "memory");
          asm volatile("ld.shared.f32 %0, [%1];" : "=f"(excess) : "r"(at + 2 * Size::kColumns * 4) : "memory");
        }
        float s = __fmul_rn(score[n][e], forward.scale);
        if (kExtras && forward.bias && query < sight.queries && key < sight.keys)
          s += widen(bias[query * forward.stride_bias[2] + key * forward.stride_bias[3]]);
        const Sight::Span span = kKeyRows ? sight.span_of_key(own, other) : sight.span(own, other);
        const bool there = kKeyRows ? query < sight.queries : mine >> local & 1;
        const bool seen = all || (there && known.there[r] && span.has(local));
        p[n][e] = seen ? exp2_fast((s - lse) * kLog2E - excess) : 0;
        float& gradient = dp[n][e];
        dropped[n][e] = p[n][e];
        if (kExtras && forward.dropout_p > 0) {
          dropped[n][e] = keeps[e] ? p[n][e] * keep_factor : 0;
          gradient = keeps[e] ? gradient * keep_factor : 0;
        }
        ds[n][e] = p[n][e] * (gradient - delta);
      }
    }
  }
};

}  // namespace attention_backward_parts
}  // namespace gpt2fast::cuda
