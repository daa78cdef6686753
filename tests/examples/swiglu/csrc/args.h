#pragma once
#include "dtype.h"

namespace gpt2fast {

// y (n) = gate sigmoid(gate) up
struct SwigluArgs {
  const void *gate, *up;
  void* y;
  int64_t n;
  DType dtype;
};

}  // namespace gpt2fast
