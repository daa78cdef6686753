// y = gelu(x + bias). The flat R C elements are cut into equal pieces, whatever C is; out of cache, y is written
// past the caches.
#pragma once
#include "activation.h"
#include "cache.h"

namespace gpt2fast {
namespace {

constexpr int64_t kGeluTaskElements = 32768;

inline int64_t gelu_tasks(const GeluArgs& args) { return ceil_div(args.R * args.C, kGeluTaskElements); }

template <Activation kActivation, bool kHasBias, class T>
inline void gelu_span(const T* x, const T* bias, T* y, int64_t n, bool past_cache) {
  constexpr int64_t kLanes = Vec::kLanes;
  auto partial = [&](int64_t i, int count) {
    Vec v = Vec::load(x + i, count);
    if constexpr (kHasBias) v = v + Vec::load(bias + i, count);
    activate<kActivation>(v).store(y + i, count);
  };
  auto whole = [&](int64_t i) {
    Vec v = Vec::load(x + i);
    if constexpr (kHasBias) v = v + Vec::load(bias + i);
    return activate<kActivation>(v);
  };
  int64_t i = 0;
  if (past_cache) {
    int64_t head = min64(n, elements_to_alignment(y));
    if (head > 0) partial(0, int(head));
    for (i = head; i + kLanes <= n; i += kLanes) whole(i).stream(y + i);
  } else {
    for (; i + kLanes <= n; i += kLanes) whole(i).store(y + i);
  }
  if (i < n) partial(i, int(n - i));
}

template <Activation kActivation, bool kHasBias, class T>
inline void gelu_range(const GeluArgs& args, int64_t begin, int64_t end, bool past_cache) {
  const T *x = (const T*)args.x, *bias = (const T*)args.bias;
  T* y = (T*)args.y;
  bool flat = !kHasBias && args.stride_x_r == args.C;
  for (int64_t i = begin, n; i < end; i += n) {
    int64_t r = i / args.C, c = i - r * args.C;
    n = flat ? end - i : min64(end - i, args.C - c);
    gelu_span<kActivation, kHasBias>(x + r * args.stride_x_r + c, kHasBias ? bias + c : bias, y + i, n, past_cache);
  }
}

inline void gelu_run(const GeluArgs& args, int64_t begin, int64_t end) {
  int64_t first = begin * kGeluTaskElements, last = min64(end * kGeluTaskElements, args.R * args.C);
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    bool past_cache = exceeds_cache(2 * args.R * args.C * int64_t(sizeof(T)));
    with_activation(args.activation, [&](auto activation) {
      constexpr Activation kActivation = decltype(activation)::value;
      if (args.bias)
        gelu_range<kActivation, true, T>(args, first, last, past_cache);
      else
        gelu_range<kActivation, false, T>(args, first, last, past_cache);
    });
    if (past_cache) stream_fence();
  });
}

}  // namespace
}  // namespace gpt2fast
