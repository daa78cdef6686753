// RMSNorm on the CPU: a row is read for the sum of its squares, and once more, from the cache, to be scaled.
#pragma once
#include "args.h"
#include "cpu/vec_math.h"

namespace gpt2fast {
namespace {

constexpr int64_t kRmsNormRows = 8;  // of a task

inline int64_t rms_norm_tasks(const RmsNormArgs& args) { return ceil_div(args.R, kRmsNormRows); }

template <class T>
inline float sum_of_squares(const T* x, int64_t C) {
  Vec sums[2] = {Vec::zero(), Vec::zero()};  // two, so that an addition does not wait for the one before it
  int64_t c = 0;
  for (; c + 2 * Vec::kLanes <= C; c += 2 * Vec::kLanes) {
    for (int i = 0; i < 2; ++i) {
      Vec v = Vec::load(x + c + i * Vec::kLanes);
      sums[i] = fma(v, v, sums[i]);
    }
  }
  for (; c < C; c += Vec::kLanes) {
    Vec v = Vec::load(x + c, int(min64(C - c, Vec::kLanes)));  // zero in the lanes beyond the row
    sums[0] = fma(v, v, sums[0]);
  }
  return reduce_add(sums[0] + sums[1]);
}

template <class T>
inline void rms_norm_row(const T* x, const T* weight, T* y, float rstd, int64_t C) {
  Vec scale = Vec::broadcast(rstd);
  int64_t c = 0;
  for (; c + Vec::kLanes <= C; c += Vec::kLanes) (Vec::load(x + c) * scale * Vec::load(weight + c)).store(y + c);
  if (int n = int(C - c)) (Vec::load(x + c, n) * scale * Vec::load(weight + c, n)).store(y + c, n);
}

inline void rms_norm_run(const RmsNormArgs& args, int64_t begin, int64_t end) {
  const int64_t last = min64(end * kRmsNormRows, args.R);
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t r = begin * kRmsNormRows; r < last; ++r) {
      const T* x = static_cast<const T*>(args.x) + r * args.stride_x_r;
      args.rstd[r] = 1.f / __builtin_sqrtf(sum_of_squares(x, args.C) / float(args.C) + args.eps);
      rms_norm_row(x, static_cast<const T*>(args.weight), static_cast<T*>(args.y) + r * args.C, args.rstd[r], args.C);
    }
  });
}

}  // namespace
}  // namespace gpt2fast
