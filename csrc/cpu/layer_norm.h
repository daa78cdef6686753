// s = x + residual (or s = x); y = (s - mean) * rstd * weight + bias, with mean and rstd of each row of s.
//
// A task is a block of rows. The floor is memory: x is read once and y is written once. A row must be read completely
// before its first output is known. So each row is read from memory while the row before it is normalised, and is read
// again from the first-level cache for the variance and for y. Results that are too large for the caches are written
// past them (cache.h).
#pragma once
#include "../ops.h"
#include "cache.h"

namespace gpt2fast {
namespace {

inline int64_t layer_norm_rows_per_task(const LayerNormArgs& args) { return max64(1, 32768 / max64(1, args.C)); }

inline int64_t layer_norm_tasks(const LayerNormArgs& args) { return ceil_div(args.R, layer_norm_rows_per_task(args)); }

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

template <bool kWhole, class T>
inline Vec load_lanes(const T* p, int n) {
  if constexpr (kWhole) return Vec::load(p);
  return Vec::load(p, n);
}

template <bool kWhole, class T>
inline void store_lanes(Vec v, T* p, int n) {
  if constexpr (kWhole)
    v.store(p);
  else
    v.store(p, n);
}

template <bool kStream, bool kWhole, class T>
inline void write_lanes(Vec v, T* p, int n) {
  if constexpr (kStream)
    v.stream(p);
  else
    store_lanes<kWhole>(v, p, n);
}

template <class T>
struct LayerNormPass {
  // The row that is read. row gets x + residual, rounded as stored; sum gets a copy past the caches.
  const T *x, *residual;
  T *row, *sum;
  const T* s;  // the row that is normalised into y
  T* y;
  const T *weight, *bias;
  float mean, rstd;
};

// Normalises one row while it reads the next, so that the memory bus is never idle. Returns the sum of the row that it
// read.
template <bool kRead, bool kResidual, bool kNormalize, bool kStream, class T>
inline float layer_norm_pass(const LayerNormPass<T>& p, int64_t n) {
  constexpr int64_t kLanes = Vec::kLanes;
  constexpr int kSums = 8;  // many short sums have a smaller rounding error than few long ones
  Vec total[kSums];
  for (Vec& t : total) t = Vec::zero();
  Vec mean = Vec::broadcast(p.mean), rstd = Vec::broadcast(p.rstd);
  auto step = [&](auto whole, int64_t i, int k, int count) {
    constexpr bool kWhole = decltype(whole)::value;
    if constexpr (kRead) {
      Vec v = load_lanes<kWhole>(p.x + i, count);
      if constexpr (kResidual) {
        v = v + load_lanes<kWhole>(p.residual + i, count);
        store_lanes<kWhole>(v, p.row + i, count);
        if constexpr (kStream) v.stream(p.sum + i);
        if constexpr (sizeof(T) < 4) v = load_lanes<kWhole>(p.row + i, count);  // as rounded
      }
      total[k] = total[k] + v;
    }
    if constexpr (kNormalize) {
      Vec d = (load_lanes<kWhole>(p.s + i, count) - mean) * rstd;
      Vec y = fma(d, load_lanes<kWhole>(p.weight + i, count), load_lanes<kWhole>(p.bias + i, count));
      write_lanes<kStream, kWhole>(y, p.y + i, count);
    }
  };
  int64_t i = 0;
  for (; i + kSums * kLanes <= n; i += kSums * kLanes)
    for (int k = 0; k < kSums; ++k) step(Flag<true>{}, i + k * kLanes, k, 0);
  for (; i + kLanes <= n; i += kLanes) step(Flag<true>{}, i, 0, 0);
  if (i < n) step(Flag<false>{}, i, 1, int(n - i));
  for (int half = kSums / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) total[k] = total[k] + total[k + half];
  return reduce_add(total[0]);
}

struct Moments {
  float mean, variance;
};

// v with zeros from lane n on.
inline Vec first_lanes(Vec v, int n) {
  float lanes[Vec::kLanes];
  v.store(lanes);
  return Vec::load(lanes, n);
}

// The mean and the variance of a row, from the deviations d = s - first, where `first` is the mean by the plain sum.
// The variance is mean(d^2) - mean(d)^2. mean(d) also corrects `first`, but only where `first` is larger than the
// standard deviation: where it is smaller, the deviations have more rounding error than the values themselves.
template <class T>
inline Moments moments_of_row(const T* s, int64_t n, float first) {
  constexpr int64_t kLanes = Vec::kLanes;
  Vec m = Vec::broadcast(first);
  Vec total[2] = {Vec::zero(), Vec::zero()}, squares[2] = {Vec::zero(), Vec::zero()};
  auto add = [&](int k, Vec d) {
    total[k] = total[k] + d;
    squares[k] = fma(d, d, squares[k]);
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
    for (int k = 0; k < 2; ++k) add(k, Vec::load(s + i + k * kLanes) - m);
  for (; i + kLanes <= n; i += kLanes) add(0, Vec::load(s + i) - m);
  if (i < n) add(1, first_lanes(Vec::load(s + i, int(n - i)) - m, int(n - i)));
  float correction = reduce_add(total[0] + total[1]) / float(n);
  float variance = reduce_add(squares[0] + squares[1]) / float(n) - correction * correction;
  variance = variance < 0 ? 0.f : variance;
  return {first * first > variance ? first + correction : first, variance};
}

template <bool kResidual, bool kStream, class T>
inline void layer_norm_rows(const LayerNormArgs& args, int64_t begin, int64_t end) {
  constexpr bool kBuffered = kResidual && kStream;
  const int64_t C = args.C;
  T* buffer = kBuffered ? (T*)scratch<0>(2 * size_t(C) * sizeof(T)) : nullptr;
  LayerNormPass<T> p = {};
  p.weight = (const T*)args.weight, p.bias = (const T*)args.bias;
  auto read_next = [&](int64_t r) {
    p.x = (const T*)args.x + r * args.stride_x_r;
    if constexpr (kResidual) {
      p.residual = (const T*)args.residual + r * args.stride_residual_r;
      p.sum = (T*)args.sum + r * C;
      p.row = kBuffered ? buffer + (r & 1) * C : p.sum;
    }
  };
  read_next(begin);
  float sum = layer_norm_pass<true, kResidual, false, kStream>(p, C);
  for (int64_t r = begin; r < end; ++r) {
    p.s = kResidual ? p.row : p.x;
    p.y = (T*)args.y + r * C;
    Moments moments = moments_of_row(p.s, C, sum / float(C));
    args.mean[r] = p.mean = moments.mean;
    args.rstd[r] = p.rstd = 1.f / __builtin_sqrtf(moments.variance + args.eps);
    if (r + 1 < end) {
      read_next(r + 1);
      sum = layer_norm_pass<true, kResidual, true, kStream>(p, C);
    } else {
      layer_norm_pass<false, kResidual, true, kStream>(p, C);
    }
  }
}

inline void layer_norm_run(const LayerNormArgs& args, int64_t begin, int64_t end) {
  int64_t rows = layer_norm_rows_per_task(args), first = begin * rows, last = min64(end * rows, args.R);
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    // Streaming needs every row to start aligned. In models of usual sizes every row does.
    bool aligned = args.C % Vec::kLanes == 0 && elements_to_alignment((T*)args.y) == 0 &&
                   (!args.residual || elements_to_alignment((T*)args.sum) == 0);
    bool stream = aligned && exceeds_cache((args.residual ? 4 : 2) * args.R * args.C * int64_t(sizeof(T)));
    auto rows_of = args.residual ? (stream ? layer_norm_rows<true, true, T> : layer_norm_rows<true, false, T>)
                                 : (stream ? layer_norm_rows<false, true, T> : layer_norm_rows<false, false, T>);
    if (first < last) rows_of(args, first, last);
    if (stream) stream_fence();
  });
}

}  // namespace
}  // namespace gpt2fast
