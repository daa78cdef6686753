// Measures this CPU's limits: how fast it reads and copies memory, and how fast it multiplies and adds in registers. A
// task has an equal share of the array, or args.repeats steps of independent accumulators. It writes what it computed
// to args.sink, so that the compiler cannot remove the work.
#pragma once
#include "dispatch.h"
#include "vec_math.h"

namespace gpt2fast {
namespace {

constexpr int kPeakStreams = 4;        // places that one task reads from, so that several prefetchers work
constexpr int64_t kPeakAhead = 512;    // how many floats ahead a stream prefetches
constexpr int kPeakAccumulators = 12;  // they hide the latency of two pipes, and fit in 16 registers with two operands
constexpr int64_t kPeakAlignment = 1024;  // floats: shares start on a 4 KiB page

inline int64_t peak_tasks(const cpu::PeakArgs& args) { return args.tasks; }

inline float peak_read(const float* x, int64_t n) {
  Vec sum[2 * kPeakStreams];
  for (Vec& s : sum) s = Vec::zero();
  int64_t part = n / kPeakStreams / (2 * Vec::kLanes) * (2 * Vec::kLanes);
  for (int64_t i = 0; i < part; i += 2 * Vec::kLanes)
    for (int k = 0; k < kPeakStreams; ++k) {
      const float* p = x + k * part + i;
      for (int j = 0; j < 2 * Vec::kLanes; j += 16) prefetch(p + kPeakAhead + j);  // a line has 16 floats
      sum[2 * k] = sum[2 * k] + Vec::load(p);
      sum[2 * k + 1] = sum[2 * k + 1] + Vec::load(p + Vec::kLanes);
    }
  for (int k = 1; k < 2 * kPeakStreams; ++k) sum[0] = sum[0] + sum[k];
  return reduce_add(sum[0]);
}

template <bool kStream>
inline float peak_copy(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i + 4 * Vec::kLanes <= n; i += 4 * Vec::kLanes)
    for (int k = 0; k < 4 * Vec::kLanes; k += Vec::kLanes) {
      Vec v = Vec::load(x + i + k);
      if constexpr (kStream)
        v.stream(y + i + k);
      else
        v.store(y + i + k);
    }
  if constexpr (kStream) stream_fence();
  return 0;
}

// Each accumulator is a chain of dependent steps. Their operands are known at run time only, so that the compiler can
// neither remove nor hoist a step.
template <class Step>
inline float peak_compute(const float* x, int64_t repeats, Step step) {
  Vec a[kPeakAccumulators];
  for (int k = 0; k < kPeakAccumulators; ++k) a[k] = Vec::load(x + k * Vec::kLanes);
  for (int64_t i = 0; i < repeats; ++i)
    for (int k = 0; k < kPeakAccumulators; ++k) a[k] = step(a[k]);
  for (int k = 1; k < kPeakAccumulators; ++k) a[0] = a[0] + a[k];
  return reduce_add(a[0]);
}

inline float peak_task(const cpu::PeakArgs& args, const float* x, float* y, int64_t n) {
  switch (args.peak) {
    case cpu::Peak::kRead:
      return peak_read(x, n);
    case cpu::Peak::kCopy:
      return peak_copy<false>(x, y, n);
    case cpu::Peak::kStream:
      return peak_copy<true>(x, y, n);
    case cpu::Peak::kFma: {
      Vec p = Vec::load(args.x), q = Vec::load(args.x + Vec::kLanes);
      return peak_compute(args.x, args.repeats, [=](Vec a) { return fma(a, p, q); });
    }
    default: {
      Pairs p = Pairs::from_vec(Vec::load(args.x)), q = Pairs::from_vec(Vec::load(args.x + Vec::kLanes));
      return peak_compute(args.x, args.repeats, [=](Vec a) { return dot(p, q, a); });
    }
  }
}

inline void peak_run(const cpu::PeakArgs& args, int64_t begin, int64_t end) {
  int64_t share = args.n / args.tasks / kPeakAlignment * kPeakAlignment;
  for (int64_t task = begin; task < end; ++task)
    args.sink[task] = peak_task(args, args.x + task * share, args.y + task * share, share);
}

// Floating-point operations in one step of all accumulators.
constexpr int64_t kPeakFlops = 2 * kPeakAccumulators * Vec::kLanes;

}  // namespace
}  // namespace gpt2fast
