// Attention of a few new queries over a KV cache. The keys are split over blocks (flash-decoding), then joined. The
// formula is that of attention.cu.
//
// A block has kSplitKeys keys (a split) of one head of one row, and all queries of that head. A thread holds numbers of
// 4 keys and their values in registers; all these loads are in flight together. For its keys, a block writes the
// greatest score, the sum of exponentials relative to it, and the sum of values times exponentials. A second kernel
// joins the splits in a fixed order. So a row has the same bits in every run, whatever the other rows are. If there is
// one split only, the block writes the output itself.
//
// The floor is memory traffic: the keys and values of the cache are read once. docs/kernels.md counts 1.04 to 1.06
// times the least bytes.
#include "attention.cuh"
#include "kernels.h"

namespace gpt2fast::cuda {
namespace {

constexpr int kHeld = 4;  // keys of a thread
constexpr int kJoinThreads = 256;

// How a block divides keys of up to kD numbers among its threads. A group of kLanes lanes has kHeld keys. Of each key,
// a lane has kPacks times kWidth neighbouring numbers, which are kPacks accesses.
template <class T, int kD, bool kAligned>
struct Layout {
  static constexpr int kWidth = kAligned ? kPack<T> : 1;
  static constexpr int kLanes = kD / kWidth < kWarp ? kD / kWidth : kWarp;  // lanes of a group
  static constexpr int kPacks = kD / kWidth / kLanes;
  static constexpr int kNumbers = kPacks * kWidth;  // numbers of a key that a lane has
  static constexpr int kGroups = kSplitKeys / kHeld;
  static constexpr int kThreads = kGroups * kLanes;
  static constexpr int kWarps = kThreads / kWarp;
  // The groups of a warp add up their sums. Each lane of the warp gets kColumns columns of the result.
  static constexpr int kColumns = kNumbers / (kWarp / kLanes);
  static_assert(kWarps >= 1 && kLanes >= kHeld && kColumns >= 1);

  // The column of number e of a lane of a group.
  static __device__ __forceinline__ int column(int lane, int e) {
    return (e / kWidth * kLanes + lane) * kWidth + e % kWidth;
  }

  static constexpr int kUnit = kWidth < 4 ? kWidth : 4;  // numbers in one access of shared memory

  // Which lane of the warp has a column of that result, and which of the lane's numbers it is.
  struct Place {
    int number, lane;
  };
  static __device__ __forceinline__ Place place(int column) {
    const int pack = column / kWidth, e = pack / kLanes * kWidth + column % kWidth;
    return {e % kColumns, e / kColumns * kLanes + pack % kLanes};
  }
  // The numbers of a lane are kStride apart in shared memory, so that 32 neighbouring columns are in 32 different
  // banks.
  static constexpr int kStride = kWarp + (kWidth > 1 ? kWarp / kWidth : 0);
};

// Which query sees which keys of row b.
struct Row {
  int length, start, window, shift;  // query t has the position of key t + shift

  __device__ __forceinline__ Row(const DecodeAttentionArgs& a, int b)
      : length(int(min(max(a.lengths[b], int64_t(0)), a.S))),
        start(a.starts ? int(min(max(a.starts[b], int64_t(0)), a.S)) : 0),
        window(a.window > 0 && a.window < kLongest ? int(a.window) : kLongest),
        shift(length - int(a.T)) {}

  __device__ __forceinline__ int first(int query) const { return max(start, query + shift - window + 1); }
  __device__ __forceinline__ bool sees(int query, int key) const { return key >= first(query) && key <= query + shift; }

  // Whether some query sees the key. Other keys are not read, so that even NaN in them has no effect.
  __device__ __forceinline__ bool has(int key) const { return key >= first(0) && key < length; }

  // The splits that have such keys: from first_split() up to, but without, end_of_splits().
  __device__ __forceinline__ int first_split() const { return first(0) / kSplitKeys; }
  __device__ __forceinline__ int end_of_splits() const {
    return first(0) < length ? (length + kSplitKeys - 1) / kSplitKeys : first_split();
  }
};

// Sums each of kCount numbers over the lanes that differ in the bits kFrom, kFrom / 2 ... kTo of their index. At each
// bit, two lanes exchange halves of their numbers; the lane whose bit is 0 keeps the lower half. In the end the sums
// are divided among the lanes, and x begins with the sums of this lane.
template <int kFrom, int kTo, int kCount>
__device__ __forceinline__ void scatter_sums(float (&x)[kCount]) {
  const int lane = threadIdx.x % kWarp;
  int count = kCount;
#pragma unroll
  for (int distance = kFrom; distance >= kTo; distance /= 2) {
    if (count == 1) {
      x[0] += __shfl_xor_sync(kAllLanes, x[0], distance);
      continue;
    }
    count /= 2;
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float given = upper ? x[i] : x[i + count], kept = upper ? x[i + count] : x[i];
      x[i] = kept + __shfl_xor_sync(kAllLanes, given, distance);
    }
  }
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

// e^(x - peak). If no key was seen, peak is -inf and x is shifted by 0, since (-inf) - (-inf) is NaN. The shift is
// subtracted before the multiplication by log2(e), because the difference of two close numbers is exact, however large
// they are.
__device__ __forceinline__ float exp_below(float x, float peak) {
  return exp2_fast((x - (peak == -INFINITY ? 0 : peak)) * kLog2E);
}

// The workspace. For each row, head, query and split it has the greatest score, the sum of exponentials and D weighted
// sums of values. The splits of one query are neighbours.
struct Parts {
  float *sums, *peaks, *totals;
  int64_t first;  // where the query's splits begin

  __device__ __forceinline__ Parts(const DecodeAttentionArgs& a, float* parts, int splits, int head, int query)
      : sums(parts),
        peaks(parts + a.B * a.H * a.T * splits * a.D),
        totals(peaks + a.B * a.H * a.T * splits),
        first((head * a.T + query) * splits) {}
};

// The page at this place in row b of the page table.
__device__ __forceinline__ int64_t page_of(const PageTable& pages, int b, int place) {
  const int64_t at = b * pages.stride_b + place;
  return pages.wide ? static_cast<const int64_t*>(pages.table)[at] : static_cast<const int32_t*>(pages.table)[at];
}

template <class T>
__device__ __forceinline__ T* out_of(const DecodeAttentionArgs& a, int head, int query) {
  const int64_t b = head / int(a.H), h = head % int(a.H);
  return static_cast<T*>(a.out) + ((b * a.T + query) * a.H + h) * a.D;
}

template <class T, int kD, bool kAligned>
__global__ void __launch_bounds__(Layout<T, kD, kAligned>::kThreads)
    decode_attention_kernel(DecodeAttentionArgs a, float* parts, PageTable pages, int splits) {
  using In = Layout<T, kD, kAligned>;
  constexpr int kWidth = In::kWidth, kLanes = In::kLanes, kPacks = In::kPacks, kNumbers = In::kNumbers;
  constexpr int kUnit = In::kUnit;
  __shared__ __align__(16) float queries[kMostNewTokens][kNumbers / kUnit][kLanes][kUnit];
  __shared__ __align__(16) float scores[kMostNewTokens][kSplitKeys];  // later their exponentials
  __shared__ float totals[kMostNewTokens];
  __shared__ float partial[In::kWarps][In::kColumns][In::kStride];  // each warp's sums of values, for one query

  const int heads = int(a.B * a.H), head = blockIdx.x % heads, split = blockIdx.x / heads;
  const int b = head / int(a.H), h = head % int(a.H), D = int(a.D), new_queries = int(a.T);
  const int warp = threadIdx.x / kWarp, group = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const Row row(a, b);
  const bool alone = splits == 1;
  if (!alone && (split < row.first_split() || split >= row.end_of_splits())) return;  // the join skips this split

  const int own_key = split * kSplitKeys + group * kHeld;
  bool has[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) has[i] = row.has(own_key + i);
  const T* k = static_cast<const T*>(a.k) + h * a.stride_k[2];
  const T* v = static_cast<const T*>(a.v) + h * a.stride_v[2];
  int64_t k_at[kHeld], v_at[kHeld];
  if (pages.table) {
    const int shift = __ffsll(pages.page_size) - 1;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int key = own_key + i;
      const int64_t page = has[i] ? page_of(pages, b, key >> shift) : 0, at = key & (pages.page_size - 1);
      k_at[i] = page * a.stride_k[0] + at * a.stride_k[1], v_at[i] = page * a.stride_v[0] + at * a.stride_v[1];
    }
  } else {
    k_at[0] = b * a.stride_k[0] + own_key * a.stride_k[1], v_at[0] = b * a.stride_v[0] + own_key * a.stride_v[1];
#pragma unroll
    for (int i = 1; i < kHeld; ++i) k_at[i] = k_at[i - 1] + a.stride_k[1], v_at[i] = v_at[i - 1] + a.stride_v[1];
  }

  // All loads of keys and values are started before the first result is used.
  float key[kHeld][kPacks][kWidth] = {}, value[kHeld][kPacks][kWidth] = {};
  const auto read = [&](const T* from, const int64_t (&at)[kHeld], float (&to)[kHeld][kPacks][kWidth]) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
#pragma unroll
      for (int pack = 0; pack < kPacks; ++pack) {
        const int column = In::column(lane, pack * kWidth);
        if (has[i] && column < D) load<T, kWidth>(from + at[i] + column, to[i][pack]);
      }
  };
  read(k, k_at, key);
  read(v, v_at, value);

  const T* q = head_of<T>(a.q, a.stride_q, b, h);
#pragma unroll 1
  for (int i = threadIdx.x; i < new_queries * kLanes * kPacks; i += In::kThreads) {
    const int query = i / (kLanes * kPacks), pack = i / kLanes % kPacks, to = i % kLanes;
    const int column = In::column(to, pack * kWidth);
    float x[kWidth] = {};
    if (column < D) load<T, kWidth>(q + query * a.stride_q[1] + column, x);
#pragma unroll
    for (int e = 0; e < kWidth; e += kUnit) {
      float* unit = queries[query][pack * (kWidth / kUnit) + e / kUnit][to];
      if constexpr (kUnit == 1) {
        *unit = x[e];
      } else {
        *reinterpret_cast<float4*>(unit) = make_float4(x[e], x[e + 1], x[e + 2], x[e + 3]);
      }
    }
  }
  __syncthreads();

  for (int query = 0; query < new_queries; ++query) {
    float score[kHeld] = {};
#pragma unroll
    for (int e = 0; e < kNumbers; ++e) {
      const float x = queries[query][e / kUnit][lane][e % kUnit];
#pragma unroll
      for (int i = 0; i < kHeld; ++i) score[i] = fmaf(x, key[i][e / kWidth][e % kWidth], score[i]);
    }
    scatter_sums<kLanes / 2, 1>(score);
    // kSharers lanes of the group now have the score of the same key.
    constexpr int kSharers = kLanes / kHeld;
    const int own = group * kHeld + lane / kSharers;
    const bool seen = row.sees(query, split * kSplitKeys + own);
    if (lane % kSharers == 0) scores[query][own] = seen ? __fmul_rn(score[0], a.scale) : -INFINITY;
  }
  __syncthreads();

  for (int query = warp; query < new_queries; query += In::kWarps) {
    float* own = scores[query] + threadIdx.x % kWarp;
    float peak = -INFINITY, total = 0;
#pragma unroll
    for (int i = 0; i < kSplitKeys; i += kWarp) peak = fmaxf(peak, own[i]);
    peak = warp_max(peak);
#pragma unroll
    for (int i = 0; i < kSplitKeys; i += kWarp) total += own[i] = exp_below(own[i], peak);
    total = warp_sum(total);
    if (threadIdx.x % kWarp > 0) continue;
    if (alone) {
      totals[query] = total;
    } else {
      const Parts to(a, parts, splits, head, query);
      to.peaks[to.first + split] = peak, to.totals[to.first + split] = total;
    }
  }
  __syncthreads();

  for (int query = 0; query < new_queries; ++query) {
    float sum[kNumbers] = {};
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const float p = scores[query][group * kHeld + i];
#pragma unroll
      for (int e = 0; e < kNumbers; ++e) sum[e] = fmaf(p, value[i][e / kWidth][e % kWidth], sum[e]);
    }
    if constexpr (kLanes < kWarp) scatter_sums<kWarp / 2, kLanes>(sum);
    if (query > 0) __syncthreads();  // no thread still reads the sums of the query before
#pragma unroll
    for (int i = 0; i < In::kColumns; ++i) partial[warp][i][threadIdx.x % kWarp] = sum[i];
    __syncthreads();
    for (int column = threadIdx.x; column < D; column += In::kThreads) {
      const typename In::Place place = In::place(column);
      float all = 0;
#pragma unroll
      for (int w = 0; w < In::kWarps; ++w) all += partial[w][place.number][place.lane];
      if (alone) {
        out_of<T>(a, head, query)[column] = narrow<T>(totals[query] == 0 ? 0 : all / totals[query]);
      } else {
        const Parts to(a, parts, splits, head, query);
        to.sums[(to.first + split) * D + column] = all;
      }
    }
  }
}

// Joins the splits. A block has one head of one query. With w = e^(peak - greatest peak) of each split, out is the sum
// of w sums, divided by the sum of w total. Several threads share a column: each has every sharers-th split.
template <class T>
__global__ void __launch_bounds__(kJoinThreads)
    decode_attention_join_kernel(DecodeAttentionArgs a, float* parts, int splits) {
  __shared__ float2 partial[kJoinThreads];
  const int head = blockIdx.x / int(a.T), query = blockIdx.x % int(a.T), D = int(a.D);
  const int columns = (D + kWarp - 1) / kWarp * kWarp, sharers = kJoinThreads / columns;
  const int column = threadIdx.x % columns, sharer = threadIdx.x / columns;
  const Row row(a, head / int(a.H));
  const Parts from(a, parts, splits, head, query);
  const int first = row.first_split(), end = row.end_of_splits();

  float peak = -INFINITY;
  for (int split = first + threadIdx.x % kWarp; split < end; split += kWarp)
    peak = fmaxf(peak, from.peaks[from.first + split]);
  peak = warp_max(peak);
  float sum = 0, total = 0;
  if (sharer < sharers && column < D) {
#pragma unroll 4
    for (int split = first + sharer; split < end; split += sharers) {
      const int64_t part = from.first + split;
      const float share = exp_below(from.peaks[part], peak);
      total = fmaf(from.totals[part], share, total);
      sum = fmaf(from.sums[part * D + column], share, sum);
    }
  }
  partial[threadIdx.x] = make_float2(sum, total);
  __syncthreads();
  if (threadIdx.x >= D) return;
  for (int other = 1; other < sharers; ++other) {
    const float2 more = partial[threadIdx.x + other * columns];
    sum += more.x, total += more.y;
  }
  out_of<T>(a, head, query)[threadIdx.x] = narrow<T>(total == 0 ? 0 : sum / total);
}

bool covered(const DecodeAttentionArgs& a, const float* parts, const PageTable& pages, int64_t splits) {
  return 1 <= a.D && a.D <= kLargestHead && a.T <= kMostNewTokens && a.S <= kLongest && (splits == 1 || parts) &&
         (!pages.table || (pages.page_size > 0 && (pages.page_size & (pages.page_size - 1)) == 0)) &&
         a.B * a.H * (splits > a.T ? splits : a.T) <= INT32_MAX;
}

}  // namespace

cudaError_t decode_attention(const DecodeAttentionArgs& a, float* parts, const PageTable& pages, cudaStream_t stream) {
  const int64_t splits = a.S > kSplitKeys ? (a.S + kSplitKeys - 1) / kSplitKeys : 1, heads = a.B * a.H;
  if (heads * a.T == 0) return cudaSuccess;
  if (!covered(a, parts, pages, splits)) return cudaErrorInvalidValue;
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool aligned = chunked<T>(a.D, {a.q, a.k, a.v}, {a.stride_q, a.stride_k, a.stride_v});
    with_head_size<64, 128, 256>(a.D, [&](auto size) {
      constexpr int kD = size.value;
      auto* kernel = aligned ? decode_attention_kernel<T, kD, true> : decode_attention_kernel<T, kD, false>;
      const int threads = aligned ? Layout<T, kD, true>::kThreads : Layout<T, kD, false>::kThreads;
      kernel<<<unsigned(heads * splits), threads, 0, stream>>>(a, parts, pages, int(splits));
    });
    if (splits > 1)
      decode_attention_join_kernel<T><<<unsigned(heads * a.T), kJoinThreads, 0, stream>>>(a, parts, int(splits));
  });
  return cudaGetLastError();
}

}  // namespace gpt2fast::cuda

// The C interface. The arguments are the fields of the structs.
extern "C" int gpt2fast_decode_attention(const void* q, const void* k, const void* v, const int64_t* lengths,
                                         const int64_t* starts, void* out, float* parts, const void* table, int64_t B,
                                         int64_t T, int64_t S, int64_t H, int64_t D, int64_t stride_q_b,
                                         int64_t stride_q_t, int64_t stride_q_h, int64_t stride_k_b, int64_t stride_k_s,
                                         int64_t stride_k_h, int64_t stride_v_b, int64_t stride_v_s, int64_t stride_v_h,
                                         int64_t stride_table_b, int64_t page_size, int64_t wide_table, int64_t window,
                                         float scale, int64_t dtype, cudaStream_t stream) {
  using namespace gpt2fast;
  return cuda::decode_attention(
      {.q = q,
       .k = k,
       .v = v,
       .lengths = lengths,
       .starts = starts,
       .out = out,
       .B = B,
       .T = T,
       .S = S,
       .H = H,
       .D = D,
       .stride_q = {stride_q_b, stride_q_t, stride_q_h},
       .stride_k = {stride_k_b, stride_k_s, stride_k_h},
       .stride_v = {stride_v_b, stride_v_s, stride_v_h},
       .window = window,
       .scale = scale,
       .dtype = DType(dtype)},
      parts, {.table = table, .stride_b = stride_table_b, .page_size = page_size, .wide = wide_table != 0}, stream);
}
