// One token per row of logits: the likeliest, or a draw after repetition penalty, temperature, top-k, top-p and min-p.
//
// A block has a row. Each of its warps has a range of the columns, so that what the warps find is in the order of the
// tokens. Top-k and top-p need a cut, the least score that survives. It is found without sorting:
// 1. One pass finds the greatest score and a lower bound for the cut.
// 2. A second pass copies the scores that may survive to a list in memory.
// 3. The cut is found bit by bit, from the highest bit on. The list of scores among which the cut may still be gets
//    shorter with every bit.
// The token is then drawn from the list. The floor is one read of the logits.
//
// Weights are added up as 64-bit integers. These sums are exact and do not depend on the order, so that the bits are
// the same in every run.
#include <bit>

#include "../math.h"
#include "kernels.h"
#include "sample.cuh"

namespace gpt2fast::cuda {
namespace {

constexpr int kPartColumns = 4096;  // columns of a row that a block of penalise_kernel has

// The greatest key such that at least k threads have that key or a greater one.
__device__ __forceinline__ uint32_t kth_of_threads(uint32_t key, int k) {
  uint32_t found = 0;
  for (uint32_t bit = 1u << 31; bit; bit >>= 1)
    if (__syncthreads_count(key >= (found | bit)) >= k) found |= bit;
  return found;
}

// Returns the greatest key from low to high such that the scores below it have a mass of at most `limit`. All keys in
// the block's lists are between low and high. of(score) is the mass of a score. `below` is the mass of the scores that
// are in no list; it becomes the mass of all scores below the returned key. `shorter` is workspace for the shorter
// lists.
template <class F>
__device__ __forceinline__ uint32_t find_cut(const List& list, float* shorter, uint32_t low, uint32_t high, Mass limit,
                                             F&& of, Mass& below, Block& block) {
  const int bits = 32 - __clz(low ^ high);  // all keys agree in the bits above these
  uint32_t cut = bits < 32 ? high >> bits << bits : 0;
  const float* from = list.scores;
  int n = list.n;
  for (int bit = bits - 1; bit >= 0; --bit) {
    Mass mass = 0;
    int kept = 0;
    for (int first = 0; first < n; first += kWarp) {
      const int place = first + lane_of_warp();
      const float x = place < n ? from[place] : 0;
      __syncwarp();  // another lane may overwrite what this lane has just read
      const uint32_t apart = (key_of(x) ^ cut) >> bit;
      const bool stays = place < n && apart < 2;  // the cut is among these; `apart` is then the bit in question
      const unsigned staying = __ballot_sync(kAllLanes, stays);
      if (stays) shorter[kept + __popc(staying & lanes_before())] = x;
      if (stays && apart == 0) mass += of(x);
      kept += __popc(staying);
    }
    __syncwarp();
    from = shorter, n = kept;
    mass = block.sums(mass).total;
    const uint32_t trial = cut | 1u << bit;
    if (below + mass <= limit && trial <= high) cut = trial, below += mass;
  }
  return cut;
}

// Drops the scores of the block's lists that are less than the k-th greatest. Returns the key of the k-th greatest.
__device__ __forceinline__ uint32_t keep_top_k(List& list, float* shorter, uint32_t low, uint32_t high, int64_t k,
                                               Block& block) {
  const Mass limit = block.sums(lane_of_warp() == 0 ? list.n : 0).total - k;
  Mass below = 0;
  const uint32_t cut = find_cut(list, shorter, low, high, limit, [](float) { return Mass(1); }, below, block);
  list.keep(cut, 0, 0);
  return cut;
}

// Drops the least scores of the block's lists, as many as together have at most `share` of the total weight. Equal
// scores are taken in the order of their tokens. `dropped` is the weight of the scores that this thread has read but
// not listed.
__device__ __forceinline__ void keep_top_p(List& list, float* shorter, uint32_t low, uint32_t high, Mass dropped,
                                           double share, const Weights& weights, Block& block) {
  Mass listed = 0;
  list.walk([&](const float (&x)[1], int) { listed += weights(x[0]); });
  Mass below = block.sums(dropped).total;
  const Mass limit = Mass(double(below + block.sums(listed).total) * share);
  const uint32_t cut = find_cut(list, shorter, low, high, limit, weights, below, block);
  Mass alike = 0;
  list.walk([&](const float (&x)[1], int place) { alike += place < list.n && key_of(x[0]) == cut; });
  const Sums equal = block.sums(alike);
  const Mass each = weights(number_of(cut));
  Mass gone = each ? (limit - below) / each : 0;                   // of equal scores the first tokens are dropped
  if (cut == high && gone >= equal.total) gone = equal.total - 1;  // the last of the greatest always stays
  list.keep(cut, equal.before, gone);
}

constexpr int kNowhere = INT32_MAX;

// The first place at which the running sum of the weights exceeds `uniform` times their total. The lanes of the warp
// that has this place return it; all other lanes return -1. If the total is 0, the first warp returns kNowhere.
template <class Source>
__device__ __forceinline__ int draw(const Source& source, const Weights& weights, float min_p, double uniform,
                                    Block& block) {
  constexpr int kWidth = Source::kWidth;
  Mass mass = 0;
  source.walk([&](const float (&x)[kWidth], int) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) mass += weights(source.score(x[i]), min_p);
  });
  const Sums sums = block.sums(mass);
  if (sums.total == 0) return warp_of_block() == 0 ? kNowhere : -1;
  Mass wanted = min(Mass(uniform * double(sums.total)), sums.total - 1);
  if (wanted < sums.before || wanted >= sums.before + sums.own) return -1;
  wanted -= sums.before;
  int found = -1;
  source.walk([&](const float (&x)[kWidth], int place) {
    if (found >= 0) return;
    Mass of[kWidth], own = 0;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) own += of[i] = weights(source.score(x[i]), min_p);
    const Mass up_to = sum_up_to(own);
    const unsigned beyond = __ballot_sync(kAllLanes, up_to > wanted);
    if (!beyond) {
      wanted -= __shfl_sync(kAllLanes, up_to, kWarp - 1);
      return;
    }
    Mass running = up_to - own;
    int passed = 0;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) passed += (running += of[i]) <= wanted;
    found = __shfl_sync(kAllLanes, place + passed, __ffs(beyond) - 1);
  });
  return found;
}

template <class T, bool kCuts>
__global__ void __launch_bounds__(kSampleThreads) sample_kernel(SampleArgs a, SampleSpace space) {
  __shared__ float peaks[kSampleWarps];
  Block block;
  const int64_t b = blockIdx.x;
  const int V = int(a.V);
  const Row<T> row(a.logits, b * a.stride_logits_b, V, a.temperature);
  const Philox random(uint64_t(*a.seed), uint64_t(a.positions[b]), uint64_t(a.rows ? a.rows[b] : b));
  float peak = -kInfinity;  // the thread's greatest logit, which also has its greatest score
  row.walk([&](const float (&x)[Row<T>::kWidth], int) {
#pragma unroll
    for (int i = 0; i < Row<T>::kWidth; ++i) peak = fmaxf(peak, x[i]);
  });
  peak = row.score(peak);
  float top = peak;
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, distance));
  if (lane_of_warp() == 0) peaks[warp_of_block()] = top;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kSampleWarps; ++w) top = fmaxf(top, peaks[w]);
  const Weights weights(top, V);
  if constexpr (!kCuts) {
    const int place = draw(row, weights, a.min_p, random.uniform53(), block);
    if (place >= 0 && lane_of_warp() == 0) a.out[b] = place == kNowhere ? V - 1 : place - row.before;
  } else {
    const bool has_top_k = 0 < a.top_k && a.top_k < a.V, has_top_p = space.share > 0;
    uint32_t low = 0;
    // low is a lower bound for the cut. For top-p: the greatest weight is 1, so that all weights below share / V
    // together are less than share of the total. For top-k: at least k scores reach the k-th greatest of the threads'
    // peaks.
    if (!has_top_k)
      low = key_of(top + logf(float(space.share / V)) - 0.01f);
    else if (a.top_k <= kSampleThreads)
      low = kth_of_threads(key_of(peak), int(a.top_k));
    const int64_t begin = b * space.stride_b + row.begin();
    List list{space.scores + begin, space.ids + begin};
    Mass dropped = 0;
    row.walk([&](const float (&x)[Row<T>::kWidth], int place) {
      float scores[Row<T>::kWidth];
      unsigned stays = 0;
#pragma unroll
      for (int i = 0; i < Row<T>::kWidth; ++i) {
        scores[i] = row.score(x[i]);
        if (row.inside(place + i) && key_of(scores[i]) >= low)
          stays |= 1u << i;
        else if (!has_top_k)
          dropped += weights(scores[i]);
      }
      list.add(stays, scores, place - row.before);
    });
    __syncwarp();
    const uint32_t high = key_of(top);
    float* shorter = space.shorter + begin;
    if (has_top_k) low = keep_top_k(list, shorter, low, high, a.top_k, block);
    if (has_top_p) keep_top_p(list, shorter, low, high, dropped, space.share, weights, block);
    const int place = draw(list, weights, a.min_p, random.uniform53(), block);
    if (place >= 0 && lane_of_warp() == 0) a.out[b] = place == kNowhere ? V - 1 : list.ids[place];
  }
}

// The token with the greatest logit; of equal ones, the first.
template <class T>
__global__ void __launch_bounds__(kSampleThreads) greedy_kernel(SampleArgs a) {
  __shared__ Mass found[kSampleWarps];
  const int64_t b = blockIdx.x;
  const Row<T> row(a.logits, b * a.stride_logits_b, int(a.V), 1);
  Mass best = 0;  // high half: the key of a logit; low half: a number that is greater for earlier columns
  row.walk([&](const float (&x)[Row<T>::kWidth], int place) {
#pragma unroll
    for (int i = 0; i < Row<T>::kWidth; ++i)
      if (row.inside(place + i)) best = max(best, Mass(key_of(x[i])) << 32 | ~uint32_t(place - row.before + i));
  });
  const auto greatest = [](Mass x) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
      x = max(x, Mass(__shfl_xor_sync(kAllLanes, x, distance)));
    return x;
  };
  best = greatest(best);
  if (lane_of_warp() == 0) found[warp_of_block()] = best;
  __syncthreads();
  if (warp_of_block() > 0) return;
  best = greatest(lane_of_warp() < kSampleWarps ? found[lane_of_warp()] : 0);
  if (lane_of_warp() == 0) a.out[b] = ~uint32_t(best);
}

// Copies a part of a row as float32 and applies the repetition penalty to the logits of earlier tokens. A token that
// occurs several times is penalised once, since the new value is always made from the original logit.
template <class T>
__global__ void __launch_bounds__(kSampleThreads) penalise_kernel(SampleArgs a, SampleSpace space, int parts) {
  const int64_t b = blockIdx.x / parts;
  const int begin = blockIdx.x % parts * kPartColumns, end = int(min(a.V, int64_t(begin) + kPartColumns));
  const T* row = static_cast<const T*>(a.logits) + b * a.stride_logits_b;
  float* changed = space.changed + b * space.stride_b;
  float x[kPartColumns / kSampleThreads];
  const int first = begin + int(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kPartColumns / kSampleThreads; ++i)
    if (first + i * kSampleThreads < end) x[i] = widen(row[first + i * kSampleThreads]);
#pragma unroll
  for (int i = 0; i < kPartColumns / kSampleThreads; ++i)
    if (first + i * kSampleThreads < end) changed[first + i * kSampleThreads] = x[i];
  __syncthreads();
  for (int64_t t = threadIdx.x; t < a.T; t += kSampleThreads) {
    const int64_t token = a.tokens[b * a.stride_tokens_b + t];
    if (token < begin || token >= end) continue;
    const float logit = widen(row[token]);
    changed[token] = logit < 0 ? logit * a.repetition_penalty : logit / a.repetition_penalty;
  }
}

template <class T>
void choose(const SampleArgs& a, const SampleSpace& space, cudaStream_t stream) {
  if (a.temperature == 0)
    greedy_kernel<T><<<unsigned(a.B), kSampleThreads, 0, stream>>>(a);
  else if ((0 < a.top_k && a.top_k < a.V) || space.share > 0)
    sample_kernel<T, true><<<unsigned(a.B), kSampleThreads, 0, stream>>>(a, space);
  else
    sample_kernel<T, false><<<unsigned(a.B), kSampleThreads, 0, stream>>>(a, space);
}

}  // namespace

cudaError_t sample(const SampleArgs& a, const SampleSpace& space, cudaStream_t stream) {
  const int64_t parts = (a.V + kPartColumns - 1) / kPartColumns;
  if (a.V < 1 || a.V > kMostColumns || a.B > INT32_MAX / parts) return cudaErrorInvalidValue;
  if (a.B == 0) return cudaSuccess;
  with_dtype(a.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (!a.tokens || a.repetition_penalty == 1) return choose<T>(a, space, stream);
    penalise_kernel<T><<<unsigned(a.B * parts), kSampleThreads, 0, stream>>>(a, space, int(parts));
    SampleArgs changed = a;
    changed.logits = space.changed, changed.stride_logits_b = space.stride_b;
    choose<float>(changed, space, stream);
  });
  return cudaGetLastError();
}

}  // namespace gpt2fast::cuda

// The C interface. The arguments are the fields of the structs.
extern "C" int gpt2fast_sample(const void* logits, const int64_t* tokens, const int64_t* seed, const int64_t* positions,
                               const int64_t* rows, int64_t* out, float* changed, float* scores, float* shorter,
                               int32_t* ids, int64_t B, int64_t T, int64_t V, int64_t stride_logits_b,
                               int64_t stride_tokens_b, int64_t stride_space_b, float temperature, float top_p,
                               float min_p, float repetition_penalty, int64_t top_k, int64_t share_bits, int64_t dtype,
                               cudaStream_t stream) {
  using namespace gpt2fast;
  return cuda::sample({.logits = logits,
                       .tokens = tokens,
                       .seed = seed,
                       .positions = positions,
                       .rows = rows,
                       .out = out,
                       .B = B,
                       .T = T,
                       .V = V,
                       .stride_logits_b = stride_logits_b,
                       .stride_tokens_b = stride_tokens_b,
                       .temperature = temperature,
                       .top_p = top_p,
                       .min_p = min_p,
                       .repetition_penalty = repetition_penalty,
                       .top_k = top_k,
                       .dtype = DType(dtype)},
                      {.changed = changed,
                       .scores = scores,
                       .shorter = shorter,
                       .ids = ids,
                       .stride_b = stride_space_b,
                       .share = std::bit_cast<double>(share_bits)},
                      stream);
}
