// lse = m + log sum exp(x - m) with m the maximum of the row's logits x, and
// loss = lse - (1 - e) x[target] - e mean(x) with e the label smoothing.
//
// A task is a block of rows. The floor is memory: each logit is read once, and nothing of that size is written. So
// there is one pass over the logits. Each lane keeps its own running maximum and sum, and rescales the sum once for
// each block of 64 vectors. At the end of the row the lanes are merged in float64.
#pragma once
#include "../ops.h"
#include "vecs.h"

namespace gpt2fast {
namespace {

constexpr int64_t kAhead = 8192;  // bytes to prefetch ahead; the CPU's own prefetchers do not look that far

inline int64_t cross_entropy_rows_per_task(const CrossEntropyArgs& args) { return max64(1, 32768 / max64(1, args.V)); }

inline int64_t cross_entropy_tasks(const CrossEntropyArgs& args) {
  return ceil_div(args.R, cross_entropy_rows_per_task(args));
}

// Kahan's compensated sum. Without it, thousands of small terms would vanish beside a large one.
struct CompensatedSum {
  Vec sum = Vec::zero(), error = Vec::zero();

  void add(Vec x) {
    Vec y = x - error, next = sum + y;
    error = select_less(abs(next), Vec::broadcast(kInfinity), (next - sum) - y, Vec::zero());  // keeps an infinite sum
    sum = next;
  }
  void scale(Vec factor) {
    sum = sum * factor;
    error = error * factor;
  }
};

// What each lane knows of the logits so far: their maximum, the sum of exp(x - maximum), and their sum if it is needed.
template <bool kNeedsMean>
struct LogitSums {
  // It starts at the lowest finite float and not at -infinity, so that a lane that saw only -infinity has sum 0, not
  // NaN.
  Vec maximum = Vec::broadcast(-3.402823466e38f);
  CompensatedSum exponentials, logits;

  // Adds kCount Vecs from x on. They are read twice, the second time from the first-level cache: if they were kept in
  // registers, the constants of exp would not fit.
  template <int kCount, class T>
  void add(const T* x) {
    constexpr int kStep = kCount < kInStep ? kCount : kInStep, kLanes = Vec::kLanes;
    using Step = Vecs<kStep>;
    Step top = Step::load(x), total = top;
    for (int k = kStep; k < kCount; k += kStep) {
      Step next = Step::load(x + k * kLanes);
      for (int j = 0; j < int(kStep * kLanes * sizeof(T)); j += 64)
        prefetch((const char*)(x + k * kLanes) + kAhead + j);
      top = max(top, next);
      if constexpr (kNeedsMean) total = total + next;
    }
    Vec previous = maximum;
    for (Vec v : top.v) maximum = max(maximum, v);
    exponentials.scale(exp_nonpositive<5>(previous - maximum));
    const Step now = Step::each([&](int) { return maximum; });
    Step sum = exp_nonpositive<5>(Step::load(x) - now);
    for (int k = kStep; k < kCount; k += kStep) sum = sum + exp_nonpositive<5>(Step::load(x + k * kLanes) - now);
    exponentials.add(sum.total());
    if constexpr (kNeedsMean) logits.add(total.total());
  }

  double lse() const {
    float m[Vec::kLanes], s[Vec::kLanes];
    maximum.store(m);
    exponentials.sum.store(s);
    float top = reduce_max(maximum);
    double all = 0;
    for (int i = 0; i < Vec::kLanes; ++i) all += double(s[i]) * __builtin_exp(double(m[i]) - double(top));
    return double(top) + __builtin_log(all);
  }
};

template <bool kNeedsMean, class T>
inline void cross_entropy_row(const CrossEntropyArgs& args, int64_t r) {
  constexpr int kBlock = 64;
  constexpr int64_t kLanes = Vec::kLanes;
  const T* x = (const T*)args.logits + r * args.stride_logits_r;
  LogitSums<kNeedsMean> sums;
  int64_t i = 0;
  for (; i + kBlock * kLanes <= args.V; i += kBlock * kLanes) {
    sums.template add<kBlock>(x + i);
  }
  for (; i + kLanes <= args.V; i += kLanes) {
    sums.template add<1>(x + i);
  }
  double tail = 0;
  if (i < args.V) {  // lanes past the end hold -infinity: exp gives 0, and the mean's sum does not include them
    float lanes[kLanes];
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] = -kInfinity;
    for (int64_t k = 0; i + k < args.V; ++k) {
      lanes[k] = to_float(x[i + k]);
      tail += lanes[k];
    }
    LogitSums<false> last{sums.maximum, sums.exponentials, {}};
    last.template add<1>(lanes);
    sums.maximum = last.maximum;
    sums.exponentials = last.exponentials;
  }
  double lse = sums.lse();
  args.lse[r] = float(lse);
  int64_t target = args.targets[r];
  if (target == args.ignore_index) {
    args.loss[r] = 0;
    return;
  }
  double e = args.label_smoothing;
  double loss = lse - (1 - e) * double(to_float(x[target]));
  if constexpr (kNeedsMean) {
    float lanes[kLanes];
    sums.logits.sum.store(lanes);
    for (int64_t k = 0; k < kLanes; ++k) tail += lanes[k];
    loss -= e * tail / double(args.V);
  }
  args.loss[r] = float(loss);
}

inline void cross_entropy_run(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
  int64_t rows = cross_entropy_rows_per_task(args), first = begin * rows, last = min64(end * rows, args.R);
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t r = first; r < last; ++r) {
      if (args.label_smoothing != 0)
        cross_entropy_row<true, T>(args, r);
      else
        cross_entropy_row<false, T>(args, r);
    }
  });
}

}  // namespace
}  // namespace gpt2fast
