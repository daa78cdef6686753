// y = gelu(x + bias). The R C elements are taken as one flat array and cut into equal pieces, one for each task,
// whatever C is. The floor is memory: x is read once and y is written once. A y that is too large for the caches is
// written past them (cache.h).
#pragma once
#include "activation.h"
#include "cache.h"

namespace gpt2fast {
namespace {

constexpr int64_t kGeluTaskElements = 32768;

inline int64_t gelu_tasks(const GeluArgs& args) { return ceil_div(args.R * args.C, kGeluTaskElements); }

template <Activation kActivation, bool kHasBias, class V, class T>
GPT2FAST_INLINE V gelu_of(const T* x, const T* bias) {
  V v = V::load(x);
  if constexpr (kHasBias) v = v + V::load(bias);
  return activate<kActivation, T>(v);
}

template <Activation kActivation, bool kHasBias, class T>
inline void gelu_part(const T* x, const T* bias, T* y, int n) {
  Vec v = Vec::load(x, n);
  if constexpr (kHasBias) v = v + Vec::load(bias, n);
  activate<kActivation, T>(v).store(y, n);
}

template <Activation kActivation, bool kHasBias, bool kStream, class T>
inline void gelu_span(const T* x, const T* bias, T* y, int64_t n) {
  using Block = Vecs<kInStep>;
  int64_t i = 0;
  if constexpr (kStream) {
    i = min64(n, elements_to_alignment(y));
    if (i) gelu_part<kActivation, kHasBias>(x, bias, y, int(i));
  }
  for (; i + Block::kLanes <= n; i += Block::kLanes) {
    Block v = gelu_of<kActivation, kHasBias, Block>(x + i, bias + i);
    if constexpr (kStream)
      v.stream(y + i);
    else
      v.store(y + i);
  }
  for (; i + Vec::kLanes <= n; i += Vec::kLanes) gelu_of<kActivation, kHasBias, Vec>(x + i, bias + i).store(y + i);
  if (i < n) gelu_part<kActivation, kHasBias>(x + i, bias + i, y + i, int(n - i));
}

template <Activation kActivation, bool kHasBias, bool kStream, class T>
inline void gelu_range(const GeluArgs& args, int64_t begin, int64_t end) {
  const T *x = (const T*)args.x, *bias = (const T*)args.bias;
  T* y = (T*)args.y;
  bool flat = !kHasBias && args.stride_x_r == args.C;
  for (int64_t i = begin, n; i < end; i += n) {
    int64_t r = i / args.C, c = i - r * args.C;
    n = flat ? end - i : min64(end - i, args.C - c);
    gelu_span<kActivation, kHasBias, kStream>(x + r * args.stride_x_r + c, kHasBias ? bias + c : x, y + i, n);
  }
}

inline void gelu_run(const GeluArgs& args, int64_t begin, int64_t end) {
  int64_t first = begin * kGeluTaskElements, last = min64(end * kGeluTaskElements, args.R * args.C);
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    bool stream = exceeds_cache(2 * args.R * args.C * int64_t(sizeof(T)));
    with_activation(args.activation, [&](auto activation) {
      constexpr Activation kActivation = decltype(activation)::value;
      auto range = args.bias
                       ? (stream ? gelu_range<kActivation, true, true, T> : gelu_range<kActivation, true, false, T>)
                       : (stream ? gelu_range<kActivation, false, true, T> : gelu_range<kActivation, false, false, T>);
      range(args, first, last);
    });
    if (stream) stream_fence();
  });
}

}  // namespace
}  // namespace gpt2fast
