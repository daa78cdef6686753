// Which calls the CPU kernels cover: asked by the bindings before a kernel runs, and by Python for reports.
#pragma once
#include <map>
#include <string>

#include "joint.h"

namespace gpt2fast {

inline const char* uncovered_dtype(const Tensor& first) {
  ScalarType dtype = first.scalar_type();
  bool covered = dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
  return covered ? nullptr : "the kernels cover float32, bfloat16 and float16 only";
}

// q is (B, T, H, D).
inline const char* uncovered_head(const Tensor& q) {
  if (const char* why = uncovered_dtype(q)) return why;
  return q.size(-1) >= 1 && q.size(-1) <= 256 ? nullptr : "the kernels cover head sizes 1 to 256 only";
}

// What each binding asks, by "namespace::name"; and what is lent. Both are in _C alone.
std::map<std::string, Objection, std::less<>>& objections();
const Joint& own_joint();

// Whether the call is one of a forward pass for gradients on a CPU with AMX, as backends.recording says.
inline bool& recording_with_amx() {
  static thread_local bool value = false;
  return value;
}

}  // namespace gpt2fast
