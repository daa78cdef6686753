// What the attention kernels share: sums over rows of scores, the rule of which query sees which key, and dropout.
// The names C, g and t are those of mma.cuh.
#pragma once
#include "../math.h"
#include "mma.cuh"

namespace gpt2fast::cuda {

constexpr int kLargestHead = 256;                   // the largest head size
constexpr int kLongest = 1 << 30;                   // the most queries or keys: the sum of two positions fits an int
constexpr float kLowest = -3.4028234663852886e38f;  // the lse of a query that sees nothing

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kIsBlackwell = true;
#else
constexpr bool kIsBlackwell = false;
#endif

// --- Rows of scores ---

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The maximum and the sum over the 4 lanes that share a row of C, in each of these lanes.
__device__ __forceinline__ float max_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}
__device__ __forceinline__ float sum_of_row(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// --- Who sees whom ---

// Which query sees which key, for one row of the batch. Query i has the position of key i + shift, so that the last
// query has the position of the last key.
struct Sight {
  int queries, keys, shift, window;  // window: how many keys a query sees, up to its own position; or kLongest
  bool causal;
  const bool* mask;  // one bool for each key, or null

  __device__ __forceinline__ Sight(const AttentionArgs& a, int b)
      : queries(int(a.T)),
        keys(int(a.S)),
        shift(int(a.S - a.T)),
        window(a.window > 0 && a.window < kLongest ? int(a.window) : kLongest),
        causal(a.causal),
        mask(a.mask ? a.mask + b * a.stride_mask_b : nullptr) {}

  // The keys that a query sees apart from the mask: those after `after` and up to `last`, counted from `key` on.
  struct Span {
    int after, last;
    __device__ __forceinline__ bool has(int key) const { return key > after && key <= last; }
  };
  __device__ __forceinline__ Span span(int query, int key) const {
    const int own = query + shift - key;
    return {own - window, causal ? own : kLongest};
  }

  // The queries that see a key apart from the mask, counted from `query` on.
  __device__ __forceinline__ Span span_of_key(int key, int query) const {
    const int own = key - shift - query;
    return {causal ? own - 1 : -kLongest, own + window - 1};
  }

  // Whether each of the `queries` queries from `query` on sees each of the `keys` keys from `key` on, if they exist and
  // the mask allows it.
  __device__ __forceinline__ bool all(int query, int queries, int key, int keys) const {
    return span(query + queries - 1, key).has(0) && span(query, key).has(keys - 1);
  }

  // Bit j is set if key + j exists, is not masked, and some query sees it. Other keys are not read, so that even NaN in
  // them has no effect.
  template <int kKeys>
  __device__ __forceinline__ uint64_t of_keys(int key) const {
    const int lane = threadIdx.x % kWarp;
    uint64_t bits = 0;
#pragma unroll
    for (int part = 0; part < kKeys; part += kWarp) {
      const int mine = key + part + lane;
      bool seen = mine < keys && mine > shift - window && part + lane < kKeys;
      if (seen && mask) seen = mask[mine];
      bits |= uint64_t(__ballot_sync(kAllLanes, seen)) << part;
    }
    return bits;
  }

  // Bit i is set if query + i exists.
  template <int kQueries>
  __device__ __forceinline__ uint64_t of_queries(int query) const {
    const int left = min(queries - query, kQueries);
    return left >= 64 ? ~uint64_t(0) : (uint64_t(1) << left) - 1;
  }
};

// A pointer to the first number of batch row b and head h. The strides are those of batch, position and head.
template <class T>
__device__ __forceinline__ const T* head_of(const void* tensor, const int64_t (&stride)[3], int b, int h) {
  return static_cast<const T*>(tensor) + b * stride[0] + h * stride[2];
}

// --- Dropout ---

// Which probabilities dropout keeps: those of a lane's rows g and g + 8 of C and its columns 2t and 2t+1. `row` is the
// number of row g (csrc/math.h); `key` is the key of column 0. Four keys share a block of Philox, so that two lanes
// need the same two blocks, one for each row. Each lane draws one of them, and the two exchange halves.
__device__ __forceinline__ void draw(bool (&keeps)[4], uint64_t seed, uint64_t row, int key, float dropout_p) {
  const int t = threadIdx.x % 4;
  const bool odd = t % 2;
  const Philox block(seed, (key + 2 * t) / 4, odd ? row + 8 : row);
  float other[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    other[e] = __shfl_xor_sync(kAllLanes, odd ? block.uniform(e) : block.uniform(2 + e), 1);
    keeps[e] = (odd ? other[e] : block.uniform(e)) >= dropout_p;
    keeps[2 + e] = (odd ? block.uniform(2 + e) : other[e]) >= dropout_p;
  }
}

// The same if the rows of C are keys and its columns are queries. `key` is the key of row g, and `row` is the number of
// the query in column 2t. The four lanes whose keys share a block draw one block each and transpose the four blocks.
__device__ __forceinline__ void draw_of_keys(bool (&keeps)[4], uint64_t seed, uint64_t row, int key, float dropout_p) {
  const int mine = threadIdx.x / 4 % 4;
  const Philox block(seed, (key + mine / 2 * 8) / 4, row + mine % 2);
  float uniform[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) uniform[i] = block.uniform(i);
#pragma unroll
  for (int bit = 2; bit > 0; bit /= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const bool high = mine & bit;
      const float other = __shfl_xor_sync(kAllLanes, high ? uniform[i] : uniform[i + bit], 4 * bit);
      (high ? uniform[i] : uniform[i + bit]) = other;
    }
#pragma unroll
  for (int e = 0; e < 4; ++e) keeps[e] = uniform[e] >= dropout_p;
}

// --- On the host ---

// Calls f with the smallest of kSizes that is at least D. Returns false if D is larger than all of them. Example:
// with_head_size<32, 64>(D, [&](auto size) { ... size.value ... });
template <int kD>
struct HeadSize {
  static constexpr int value = kD;
};
template <int... kSizes, class F>
bool with_head_size(int64_t D, F&& f) {
  return ((D <= kSizes ? (f(HeadSize<kSizes>{}), true) : false) || ...);
}

// Whether the rows of all heads can be read 16 bytes at a time: a chunk is then either whole or absent.
template <class T>
bool chunked(int64_t D, std::initializer_list<const void*> pointers, std::initializer_list<const int64_t*> strides) {
  bool all = packed<T>(pointers, {}) && D % kChunk == 0;
  for (const int64_t* s : strides) all = all && packed<T>({}, {s[0], s[1], s[2]});
  return all;
}

}  // namespace gpt2fast::cuda
