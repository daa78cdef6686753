// All kernels of one instruction set. Each isa_*.cpp includes this after its vec header. Everything is in an anonymous
// namespace, so that the linker never mixes code for different instruction sets.
#pragma once
#include "dispatch.h"
#include "vec_math.h"

// the kernels, which use the Vec included before this header
#include "attention.h"
#include "cross_entropy.h"
#include "decode_attention.h"
#include "embedding.h"
#include "gelu.h"
#include "int4_linear.h"
#include "int8_embedding.h"
#include "int8_linear.h"
#include "layer_norm.h"
#include "linear.h"
#include "peak.h"
#include "sample.h"

#define GPT2FAST_KERNEL(name) {name##_tasks, name##_run}
#define GPT2FAST_TABLE(name)                                     \
  namespace gpt2fast::cpu {                                      \
  extern const Table table_##name;                               \
  const Table table_##name = {#name,                             \
                              GPT2FAST_KERNEL(embedding),        \
                              GPT2FAST_KERNEL(layer_norm),       \
                              GPT2FAST_KERNEL(linear),           \
                              GPT2FAST_KERNEL(int8_linear),      \
                              GPT2FAST_KERNEL(int4_linear),      \
                              GPT2FAST_KERNEL(int8_embedding),   \
                              GPT2FAST_KERNEL(gelu),             \
                              GPT2FAST_KERNEL(attention),        \
                              GPT2FAST_KERNEL(decode_attention), \
                              GPT2FAST_KERNEL(cross_entropy),    \
                              GPT2FAST_KERNEL(sample),           \
                              GPT2FAST_KERNEL(peak),             \
                              kPeakFlops};                       \
  }
