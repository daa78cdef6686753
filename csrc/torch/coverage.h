// Which calls the CPU kernels cover. The bindings ask before they run a kernel, and Python asks for its reports. Each
// function returns null, or the reason why a call is not covered.
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

// The coverage function of each binding, by "namespace::name", and what _C lends to other libraries (joint.h). Both
// exist in _C only.
std::map<std::string, Objection, std::less<>>& objections();
const Joint& own_joint();

// Whether the call belongs to a forward pass that records for gradients, on a CPU with AMX. backends.recording sets it.
inline bool& recording_with_amx() {
  static thread_local bool value = false;
  return value;
}

}  // namespace gpt2fast
