// Finds out which instruction sets this CPU supports, and chooses the table of kernels.
#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

namespace gpt2fast::cpu {

#define GPT2FAST_TABLE_EXTERN(isa, prefix) extern const Table prefix##isa;
#define GPT2FAST_TABLE_ENTRY(isa, prefix) &prefix##isa,
GPT2FAST_EACH_ISA(GPT2FAST_TABLE_EXTERN, table_)
static const Table* const kTables[] = {GPT2FAST_EACH_ISA(GPT2FAST_TABLE_ENTRY, table_)};

#if defined(__x86_64__)
bool cpu_supports(const char* isa) {
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!std::strcmp(isa, "avx512_bf16")) {
    return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  }
  if (!std::strcmp(isa, "avx512")) return avx512;
  if (!std::strcmp(isa, "avx2")) return avx2;
  return !std::strcmp(isa, "scalar");
}
#elif defined(__aarch64__)
bool cpu_supports(const char* isa) { return !std::strcmp(isa, "neon") || !std::strcmp(isa, "scalar"); }
#else
bool cpu_supports(const char* isa) { return !std::strcmp(isa, "scalar"); }
#endif

constexpr int kTableCount = sizeof(kTables) / sizeof(kTables[0]);

const char* const* compiled_isas() {
  static const char* names[kTableCount + 1];
  for (int i = 0; i < kTableCount; ++i) names[i] = kTables[i]->isa;
  return names;
}

static const Table* find(const char* isa) {
  std::string choices;
  for (const Table* t : kTables) {
    if (!cpu_supports(t->isa)) continue;
    if (!std::strcmp(t->isa, isa)) return t;
    choices += (choices.empty() ? "" : ", ") + std::string(t->isa);
  }
  throw std::invalid_argument("gpt2fast: CPU ISA must be one that this CPU runs (" + choices + "), got '" + isa + "'");
}

static void* take_aligned(size_t nbytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, nbytes)) throw std::bad_alloc();
  return memory;
}

Workspace& workspace() {
  static Workspace here{take_aligned, std::free};
  return here;
}

static std::atomic<const Table*> chosen{nullptr};

void set_isa(const char* isa) { chosen.store(find(isa)); }

const Table& table() {
  const Table* t = chosen.load(std::memory_order_relaxed);
  if (t) return *t;
  const char* forced = std::getenv("GPT2FAST_CPU_ISA");
  if (forced && *forced) {
    t = find(forced);
  } else {
    for (int i = kTableCount - 1; i >= 0; --i)
      if (cpu_supports(kTables[i]->isa)) t = kTables[i];
  }
  chosen.store(t);
  return *t;
}

}  // namespace gpt2fast::cpu
