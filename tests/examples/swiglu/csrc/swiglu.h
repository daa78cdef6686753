// SwiGLU on the CPU: equal pieces of all elements, whatever row they are in.
#pragma once
#include "args.h"
#include "cpu/vec_math.h"

namespace gpt2fast {
namespace {

constexpr int64_t kSwigluElements = 16384;  // of a task

inline int64_t swiglu_tasks(const SwigluArgs& args) { return ceil_div(args.n, kSwigluElements); }

inline Vec swiglu_of(Vec gate, Vec up) {
  const Vec one = Vec::broadcast(1.f);
  return gate / (one + exp(Vec::zero() - gate)) * up;
}

inline void swiglu_run(const SwigluArgs& args, int64_t begin, int64_t end) {
  const int64_t last = min64(end * kSwigluElements, args.n);
  with_dtype(args.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T *gate = static_cast<const T*>(args.gate), *up = static_cast<const T*>(args.up);
    T* y = static_cast<T*>(args.y);
    int64_t i = begin * kSwigluElements;
    for (; i + Vec::kLanes <= last; i += Vec::kLanes) swiglu_of(Vec::load(gate + i), Vec::load(up + i)).store(y + i);
    if (int n = int(last - i); n > 0) swiglu_of(Vec::load(gate + i, n), Vec::load(up + i, n)).store(y + i, n);
  });
}

}  // namespace
}  // namespace gpt2fast
