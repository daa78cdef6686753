// s = x + residual; y = (s - mean) * rstd * weight + bias, variance from the deviations. A task is a block of rows; a
// row is read from memory once and then from L1; out of cache, y and s are written past the caches.
#pragma once
#include "../ops.h"
#include "cache.h"

namespace gpt2fast {
namespace {

inline int64_t layer_norm_rows_per_task(const LayerNormArgs& args) { return max64(1, 32768 / max64(1, args.C)); }

inline int64_t layer_norm_tasks(const LayerNormArgs& args) { return ceil_div(args.R, layer_norm_rows_per_task(args)); }

// whole(i) for each Vec of n elements, partial(i, count) for those left.
template <class Whole, class Partial>
inline void for_each_vec(int64_t n, Whole whole, Partial partial) {
  int64_t i = 0;
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) whole(i);
  if (i < n) partial(i, int(n - i));
}

// v, zero from lane n on
inline Vec first_lanes(Vec v, int n) {
  float lanes[Vec::kLanes];
  v.store(lanes);
  return Vec::load(lanes, n);
}

// The sum x + residual as stored, into row and, past the caches, into sum.
template <bool kStream, class T>
inline void add_row(const T* x, const T* residual, T* row, T* sum, int64_t n) {
  for_each_vec(
      n,
      [&](int64_t i) {
        Vec s = Vec::load(x + i) + Vec::load(residual + i);
        s.store(row + i);
        if constexpr (kStream) s.stream(sum + i);
      },
      [&](int64_t i, int m) {
        Vec s = Vec::load(x + i, m) + Vec::load(residual + i, m);
        s.store(row + i, m);
        if constexpr (kStream) s.store(sum + i, m);
      });
}

template <class T>
inline float mean_of_row(const T* s, int64_t n) {
  constexpr int64_t kLanes = Vec::kLanes;
  Vec total[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int k = 0; k < 4; ++k) total[k] = total[k] + Vec::load(s + i + k * kLanes);
  for (; i + kLanes <= n; i += kLanes) total[0] = total[0] + Vec::load(s + i);
  if (i < n) total[1] = total[1] + Vec::load(s + i, int(n - i));
  return reduce_add((total[0] + total[1]) + (total[2] + total[3])) / float(n);
}

template <class T>
inline float variance_of_row(const T* s, int64_t n, float mean) {
  constexpr int64_t kLanes = Vec::kLanes;
  Vec m = Vec::broadcast(mean);
  Vec total[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int k = 0; k < 4; ++k) {
      Vec d = Vec::load(s + i + k * kLanes) - m;
      total[k] = fma(d, d, total[k]);
    }
  for (; i + kLanes <= n; i += kLanes) {
    Vec d = Vec::load(s + i) - m;
    total[0] = fma(d, d, total[0]);
  }
  if (i < n) {
    Vec d = first_lanes(Vec::load(s + i, int(n - i)) - m, int(n - i));
    total[1] = fma(d, d, total[1]);
  }
  return reduce_add((total[0] + total[1]) + (total[2] + total[3])) / float(n);
}

template <bool kStream, class T>
inline void normalize_row(const T* s, const T* weight, const T* bias, T* y, int64_t n, float mean, float rstd) {
  Vec m = Vec::broadcast(mean), scale = Vec::broadcast(rstd);
  for_each_vec(
      n,
      [&](int64_t i) {
        Vec v = fma((Vec::load(s + i) - m) * scale, Vec::load(weight + i), Vec::load(bias + i));
        if constexpr (kStream)
          v.stream(y + i);
        else
          v.store(y + i);
      },
      [&](int64_t i, int k) {
        fma((Vec::load(s + i, k) - m) * scale, Vec::load(weight + i, k), Vec::load(bias + i, k)).store(y + i, k);
      });
}

template <bool kStream, class T>
inline void layer_norm_rows(const LayerNormArgs& args, int64_t begin, int64_t end) {
  const int64_t C = args.C;
  const T *weight = (const T*)args.weight, *bias = (const T*)args.bias;
  T* buffer = kStream && args.residual ? (T*)scratch<0>(size_t(C) * sizeof(T)) : nullptr;
  for (int64_t r = begin; r < end; ++r) {
    const T* s = (const T*)args.x + r * args.stride_x_r;
    if (args.residual) {
      T* sum = (T*)args.sum + r * C;
      T* row = kStream ? buffer : sum;
      add_row<kStream>(s, (const T*)args.residual + r * args.stride_residual_r, row, sum, C);
      s = row;
    }
    float mean = mean_of_row(s, C);
    float rstd = 1.f / __builtin_sqrtf(variance_of_row(s, C, mean) + args.eps);
    normalize_row<kStream>(s, weight, bias, (T*)args.y + r * C, C, mean, rstd);
    args.mean[r] = mean;
    args.rstd[r] = rstd;
  }
}

inline void layer_norm_run(const LayerNormArgs& args, int64_t begin, int64_t end) {
  int64_t rows = layer_norm_rows_per_task(args), first = begin * rows, last = min64(end * rows, args.R);
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    // Rows must all start aligned; the sizes of real models do.
    bool aligned = args.C % Vec::kLanes == 0 && elements_to_alignment((T*)args.y) == 0 &&
                   (!args.residual || elements_to_alignment((T*)args.sum) == 0);
    if (aligned && exceeds_cache((args.residual ? 4 : 2) * args.R * args.C * int64_t(sizeof(T)))) {
      layer_norm_rows<true, T>(args, first, last);
      stream_fence();
    } else {
      layer_norm_rows<false, T>(args, first, last);
    }
  });
}

}  // namespace
}  // namespace gpt2fast
