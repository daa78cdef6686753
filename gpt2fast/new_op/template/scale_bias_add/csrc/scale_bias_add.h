// y = x * scale + bias + residual, some rows a task.
#pragma once
#include "args.h"
#include "cpu/vec_math.h"

namespace gpt2fast {
namespace {

constexpr int64_t kScaleBiasAddRows = 16;

inline int64_t scale_bias_add_tasks(const ScaleBiasAddArgs& args) { return ceil_div(args.R, kScaleBiasAddRows); }

template <class T>
inline void scale_bias_add_row(const T* x, const T* scale, const T* bias, const T* residual, T* y, int64_t C) {
  int64_t c = 0;
  for (; c + Vec::kLanes <= C; c += Vec::kLanes)
    (fma(Vec::load(x + c), Vec::load(scale + c), Vec::load(bias + c)) + Vec::load(residual + c)).store(y + c);
  if (int n = int(C - c))
    (fma(Vec::load(x + c, n), Vec::load(scale + c, n), Vec::load(bias + c, n)) + Vec::load(residual + c, n))
        .store(y + c, n);
}

inline void scale_bias_add_run(const ScaleBiasAddArgs& args, int64_t begin, int64_t end) {
  int64_t last = min64(end * kScaleBiasAddRows, args.R);
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (int64_t r = begin * kScaleBiasAddRows; r < last; ++r)
      scale_bias_add_row((const T*)args.x + r * args.stride_x_r, (const T*)args.scale, (const T*)args.bias,
                         (const T*)args.residual + r * args.stride_residual_r, (T*)args.y + r * args.C, args.C);
  });
}

}  // namespace
}  // namespace gpt2fast
