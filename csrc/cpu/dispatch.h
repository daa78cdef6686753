// The table of CPU kernels of one instruction set, and the choice of the table at run time.
#pragma once
#include <cstddef>

#include "../ops.h"

namespace gpt2fast::cpu {

// The work of a call is cut into tasks(args) tasks, and run executes tasks [begin, end). Each task owns its outputs, so
// that a result never depends on which thread runs which task.
template <class Args>
struct Kernel {
  int64_t (*tasks)(const Args&);
  void (*run)(const Args&, int64_t begin, int64_t end);
};

// Where kernels get scratch memory, which each thread keeps and reuses. Whoever runs the kernels sets this once, before
// the first kernel runs. take never returns null: it throws instead.
struct Workspace {
  void* (*take)(size_t nbytes);  // aligned to 64 bytes
  void (*give_back)(void* memory);
};
Workspace& workspace();

// What benchmarks/peak.py measures: reading n floats of x, copying them to y, or `repeats` steps of multiply-adds in
// registers.
enum class Peak : int32_t { kRead, kCopy, kStream, kFma, kDot };

struct PeakArgs {
  Peak peak;
  const float* x;
  float *y, *sink;  // sink (tasks): a result of each task, so that the compiler cannot remove its work
  int64_t n, tasks, repeats;
};

// All kernels, compiled for one instruction set.
struct Table {
  const char* isa;
  Kernel<EmbeddingArgs> embedding;
  Kernel<LayerNormArgs> layer_norm;  // with args.residual it is add_layer_norm
  Kernel<LinearArgs> linear;
  Kernel<PackedLinearArgs> int8_linear;
  Kernel<PackedLinearArgs> int4_linear;
  Kernel<PackedEmbeddingArgs> int8_embedding;
  Kernel<GeluArgs> gelu;  // with args.bias it is bias_gelu
  Kernel<AttentionArgs> attention;
  Kernel<DecodeAttentionArgs> decode_attention;
  Kernel<CrossEntropyArgs> cross_entropy;
  Kernel<SampleArgs> sample;
  Kernel<PeakArgs> peak;
  int64_t peak_flops;  // operations of one step of peak's multiply-adds
};

// Expands F(isa, ...) for each instruction set that kernels are compiled for on this architecture, best first.
#if defined(__x86_64__)
#define GPT2FAST_EACH_ISA(F, ...) \
  F(avx512_bf16, __VA_ARGS__) F(avx512, __VA_ARGS__) F(avx2, __VA_ARGS__) F(scalar, __VA_ARGS__)
#elif defined(__aarch64__)
#define GPT2FAST_EACH_ISA(F, ...) F(neon, __VA_ARGS__) F(scalar, __VA_ARGS__)
#else
#define GPT2FAST_EACH_ISA(F, ...) F(scalar, __VA_ARGS__)
#endif

// The instruction sets compiled into this binary, best first; the list ends with a null pointer. cpu_supports is true
// for those that this CPU can run.
const char* const* compiled_isas();
bool cpu_supports(const char* isa);

// table() is the table in use: the best that the CPU supports, or the one that GPT2FAST_CPU_ISA or set_isa names.
// Both functions throw std::invalid_argument, which lists the valid choices, if the name is unknown or if the CPU lacks
// that instruction set.
const Table& table();
void set_isa(const char* isa);

}  // namespace gpt2fast::cpu
