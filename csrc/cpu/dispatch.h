// The table of CPU kernels of one instruction set, and the choice of the table at run time.
#pragma once
#include <cstddef>

#include "../ops.h"

namespace gpt2fast::cpu {

// The work of a call is cut into tasks(args) pieces; run does [begin, end) of them. Which thread runs which task never
// changes a result: a task owns its outputs.
template <class Args>
struct Kernel {
  int64_t (*tasks)(const Args&);
  void (*run)(const Args&, int64_t begin, int64_t end);
};

// Where kernels get memory of their own, which each thread keeps and reuses: what runs the kernels says so, once,
// before the first runs. take never answers null: it throws.
struct Workspace {
  void* (*take)(size_t nbytes);  // aligned to 64 bytes
  void (*give_back)(void* memory);
};
Workspace& workspace();

// What benchmarks/peak.py measures: n floats of x read, or copied to y; or repeats steps of multiply-adds in registers.
enum class Peak : int32_t { kRead, kCopy, kStream, kFma, kDot };

struct PeakArgs {
  Peak peak;
  const float* x;
  float *y, *sink;  // sink (tasks)
  int64_t n, tasks, repeats;
};

struct Table {
  const char* isa;
  Kernel<EmbeddingArgs> embedding;
  Kernel<LayerNormArgs> layer_norm;  // add_layer_norm too: with args.residual
  Kernel<LinearArgs> linear;
  Kernel<GeluArgs> gelu;  // bias_gelu too: with args.bias
  Kernel<AttentionArgs> attention;
  Kernel<DecodeAttentionArgs> decode_attention;
  Kernel<CrossEntropyArgs> cross_entropy;
  Kernel<SampleArgs> sample;
  Kernel<PeakArgs> peak;
  int64_t peak_flops;  // of one step of peak's multiply-adds
};

// F(isa, ...) for each instruction set that kernels are compiled for on this machine, best first.
#if defined(__x86_64__)
#define GPT2FAST_EACH_ISA(F, ...) \
  F(avx512_bf16, __VA_ARGS__) F(avx512, __VA_ARGS__) F(avx2, __VA_ARGS__) F(scalar, __VA_ARGS__)
#elif defined(__aarch64__)
#define GPT2FAST_EACH_ISA(F, ...) F(neon, __VA_ARGS__) F(scalar, __VA_ARGS__)
#else
#define GPT2FAST_EACH_ISA(F, ...) F(scalar, __VA_ARGS__)
#endif

// Instruction sets compiled into this binary, best first, null-terminated; those this CPU can run answer true.
const char* const* compiled_isas();
bool cpu_supports(const char* isa);

// The table in use: the best that the CPU supports, or what GPT2FAST_CPU_ISA or set_isa named.
// Both throw std::invalid_argument naming the valid choices when the name is unknown or the CPU lacks it.
const Table& table();
void set_isa(const char* isa);

}  // namespace gpt2fast::cpu
