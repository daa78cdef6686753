// Draws one token for each row. A task is one row. The steps are repetition penalty, temperature, top-k, top-p, min-p,
// and then the draw: the first token at which the running sum of the weights exceeds u times their total, for a uniform
// u from Philox. Top-k and top-p find their cut by histograms of the scores, round by round, so that nothing is sorted.
#pragma once
#include "../ops.h"
#include "vec_math.h"

namespace gpt2fast {
namespace {

inline int64_t sample_tasks(const SampleArgs& args) { return args.B; }

// The tokens that are still candidates, in ascending order. scores and weights have room for whole Vecs.
struct Candidates {
  float *scores, *weights;
  int32_t *ids, *list;
  int64_t n;
};

inline Candidates sample_scratch(int64_t V) {
  int64_t room = ceil_div(V, 16) * 16;
  float* data = (float*)scratch<0>(size_t(room) * 16);
  return {data, data + room, (int32_t*)(data + 2 * room), (int32_t*)(data + 3 * room), V};
}

// scores = logits after repetition penalty and temperature. Infinities become the largest finite floats, so that the
// difference of two scores is never NaN.
template <class T>
inline void load_scores(const SampleArgs& args, int64_t b, float* scores) {
  constexpr float kLargest = 3.402823466e38f;
  const T* logits = (const T*)args.logits + b * args.stride_logits_b;
  float temperature = args.temperature == 0 ? 1.f : args.temperature;
  auto scale = [&](Vec x) {
    x = x / Vec::broadcast(temperature);
    return min(max(x, Vec::broadcast(-kLargest)), Vec::broadcast(kLargest));
  };
  int64_t i = 0;
  for (; i + Vec::kLanes <= args.V; i += Vec::kLanes) scale(Vec::load(logits + i)).store(scores + i);
  if (i < args.V) scale(Vec::load(logits + i, int(args.V - i))).store(scores + i, int(args.V - i));
  if (!args.tokens || args.repetition_penalty == 1) return;
  for (int64_t t = 0; t < args.T; ++t) {  // starts from the logit, so that a repeated token is penalised only once
    int64_t token = args.tokens[b * args.stride_tokens_b + t];
    if (token < 0) continue;
    float x = to_float(logits[token]);
    x = (x < 0 ? x * args.repetition_penalty : x / args.repetition_penalty) / temperature;
    scores[token] = x > kLargest ? kLargest : x < -kLargest ? -kLargest : x;
  }
}

inline float largest(const float* x, int64_t n) {
  Vec top[4];
  for (Vec& t : top) t = Vec::broadcast(x[0]);
  int64_t i = 0;
  for (; i + 4 * Vec::kLanes <= n; i += 4 * Vec::kLanes)
    for (int k = 0; k < 4; ++k) top[k] = max(top[k], Vec::load(x + i + k * Vec::kLanes));
  float out = reduce_max(max(max(top[0], top[1]), max(top[2], top[3])));
  for (; i < n; ++i) out = x[i] > out ? x[i] : out;
  return out;
}

inline int64_t first_index_of(float value, const float* x, int64_t n) {
  int64_t i = 0;
  while (i + 1 < n && x[i] != value) ++i;
  return i;
}

// The sum of weights[begin, end) in float64, in an order that depends on the range only.
inline double sum_of(const float* weights, int64_t begin, int64_t end) {
  double s[8] = {};
  int64_t i = begin;
  for (; i + 8 <= end; i += 8)
    for (int k = 0; k < 8; ++k) s[k] += double(weights[i + k]);
  for (; i < end; ++i) s[0] += double(weights[i]);
  return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
}

// The last candidate to survive: where the mass, added up in descending order of (score, index), first reaches the mass
// wanted.
struct Cut {
  float score;
  int64_t index;
};

// The mass of a candidate is its weight, or 1. Each round makes a histogram of the scores and finds the bucket that the
// cut falls into. The next round looks at the members of that bucket only.
template <bool kWeighted>
inline Cut find_cut(const Candidates& c, float top, double wanted) {
  constexpr int kBuckets = 1024, kFew = 48;
  int32_t* list = c.list;
  int64_t n = c.n;
  auto mass_of = [&](int32_t i) { return kWeighted ? double(c.weights[i]) : 1.; };
  for (int64_t i = 0; i < n; ++i) list[i] = int32_t(i);
  // A float32 weight is 0 where the score is 104 below the top. The last term keeps low below high where high is so
  // large that float64 would absorb the 104.
  double high = top, low = high - 104 - 1e-7 * __builtin_fabs(high), before = 0;
  while (n > kFew && high > low) {
    double mass[kBuckets] = {}, factor = (kBuckets - 0.5) / (high - low);
    auto bucket_of = [&](int32_t i) {
      double x = (high - double(c.scores[i])) * factor;
      return int(x < kBuckets - 1 ? x : kBuckets - 1);
    };
    for (int64_t j = 0; j < n; ++j) mass[bucket_of(list[j])] += mass_of(list[j]);
    int bucket = 0;
    double sum = before;
    for (int k = 0; k < kBuckets; ++k) {
      if (mass[k] == 0) continue;
      bucket = k;
      before = sum;
      sum += mass[k];
      if (sum >= wanted) break;
    }
    int64_t kept = 0;
    for (int64_t j = 0; j < n; ++j) {
      int32_t i = list[j];
      list[kept] = i;
      kept += bucket_of(i) == bucket;
    }
    n = kept;
    high = low = c.scores[list[0]];
    for (int64_t j = 1; j < n; ++j) {
      double x = c.scores[list[j]];
      high = x > high ? x : high;
      low = x < low ? x : low;
    }
  }
  if (high > low)  // few are left: insertion sort, ascending by (score, index); ties are in order already
    for (int64_t j = 1; j < n; ++j) {
      int32_t i = list[j];
      int64_t k = j;
      for (; k > 0 && c.scores[list[k - 1]] > c.scores[i]; --k) list[k] = list[k - 1];
      list[k] = i;
    }
  int32_t last = list[n - 1];
  for (int64_t j = n - 1; j >= 0 && mass_of(list[j]) > 0; --j) {
    last = list[j];
    before += mass_of(last);
    if (before >= wanted) break;
  }
  return {c.scores[last], last};
}

// Appends the candidates of [begin, end) whose score is at least threshold to c. The id of candidate i is ids[i], or i
// if ids is null.
inline void keep_at_least(float threshold, int64_t begin, int64_t end, const int32_t* ids, Candidates& c) {
  for (int64_t i = begin; i < end; ++i) {
    float score = c.scores[i];
    c.scores[c.n] = score;
    c.ids[c.n] = ids ? ids[i] : int32_t(i);
    c.n += score >= threshold;
  }
}

// Keeps the k largest scores, and scores equal to the k-th. The scores are first cut into spans. At least k scores
// reach the k-th largest of the spans' maxima, so that it is a lower bound of the k-th largest score, and few scores
// reach it.
inline void keep_top_k(Candidates& c, float top, int64_t k) {
  constexpr int64_t kSpan = 64;
  int64_t V = c.n, spans = ceil_div(V, kSpan);
  Candidates maxima = {c.weights, nullptr, nullptr, c.list, spans};
  for (int64_t s = 0; s < spans; ++s) maxima.scores[s] = largest(c.scores + s * kSpan, min64(kSpan, V - s * kSpan));
  float bound = k <= spans ? find_cut<false>(maxima, top, double(k)).score : -kInfinity;
  c.n = 0;
  for (int64_t s = 0; s < spans; ++s)
    if (maxima.scores[s] >= bound) keep_at_least(bound, s * kSpan, min64(V, (s + 1) * kSpan), nullptr, c);
  float threshold = find_cut<false>(c, top, double(k)).score;
  int64_t n = c.n;
  c.n = 0;
  keep_at_least(threshold, 0, n, c.ids, c);
}

inline void weigh(Candidates& c, float top) {
  for (int64_t i = 0; i < c.n; i += Vec::kLanes)
    exp(Vec::load(c.scores + i) - Vec::broadcast(top)).store(c.weights + i);
}

// The first index at which the running sum of the weights exceeds u * total. Sums of whole blocks skip most of the way.
inline int64_t draw(const Candidates& c, double total, double u) {
  constexpr int64_t kBlock = 256;
  double target = u * total, running = 0;
  int64_t i = 0, last = 0;
  for (; i + kBlock < c.n; i += kBlock) {
    double sum = sum_of(c.weights, i, i + kBlock);
    if (running + sum > target) break;
    running += sum;
  }
  for (int64_t k = i; k < c.n; ++k) {
    if (c.weights[k] == 0) continue;
    last = k;
    running += double(c.weights[k]);
    if (running > target) return k;
  }
  for (; last == 0 && i > 0; --i)  // rounding kept the sum from the target: take the last survivor
    if (c.weights[i] > 0) last = i;
  return last;
}

template <class T>
inline int64_t sample_row(const SampleArgs& args, int64_t b) {
  Candidates c = sample_scratch(args.V);
  load_scores<T>(args, b, c.scores);
  float top = largest(c.scores, args.V);
  if (args.temperature == 0) return first_index_of(top, c.scores, args.V);
  bool has_top_k = args.top_k > 0 && args.top_k < args.V;
  if (has_top_k) keep_top_k(c, top, args.top_k);
  weigh(c, top);
  if (args.top_p < 1) {
    Cut cut = find_cut<true>(c, top, double(args.top_p) * sum_of(c.weights, 0, c.n));
    for (int64_t i = 0; i < c.n; ++i)
      if (c.scores[i] < cut.score || (c.scores[i] == cut.score && i < cut.index)) c.weights[i] = 0;
  }
  if (args.min_p > 0)
    for (int64_t i = 0; i < c.n; ++i) c.weights[i] = c.weights[i] < args.min_p ? 0.f : c.weights[i];
  Philox random(uint64_t(args.seed[0]), uint64_t(args.positions[b]), uint64_t(args.rows ? args.rows[b] : b));
  int64_t i = draw(c, sum_of(c.weights, 0, c.n), random.uniform53());
  return has_top_k ? c.ids[i] : i;
}

inline void sample_run(const SampleArgs& args, int64_t begin, int64_t end) {
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t b = begin; b < end; ++b) args.out[b] = sample_row<T>(args, b);
  });
}

}  // namespace
}  // namespace gpt2fast
