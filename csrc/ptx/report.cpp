// Findings of a launch: one for each kind and pair of places, the rest only counted.
#include <functional>
#include <string_view>

#include "machine.h"

namespace gpt2fast::ptx {
namespace {

constexpr size_t kMostErrors = 16;

uint64_t key(const char* kind, uint32_t pc, uint32_t other_pc) {
  return std::hash<std::string_view>{}(kind) ^ (uint64_t(pc) << 32 | other_pc) * 0x9e3779b97f4a7c15u;
}

}  // namespace

std::string Launch::place(uint32_t pc) const {
  const Instruction& i = module.code[pc];
  std::string source = module.source_of(i);
  return "line " + std::to_string(i.line) + (source.empty() ? "" : " (" + source + ")");
}

bool Launch::repeats(const char* kind, uint32_t pc, uint32_t other_pc) {
  if (!reported.count(key(kind, pc, other_pc))) return false;
  ++error_count;
  return true;
}

Error* Launch::report(const char* kind, const std::string& message, const Warp& warp, uint32_t pc, int lane,
                      uint32_t other_pc) {
  ++error_count;
  if (!reported.insert(key(kind, pc, other_pc)).second || errors.size() >= kMostErrors) return nullptr;
  Error& e = errors.emplace_back();
  e.kind = kind;
  e.message = message;
  e.pc = pc;
  e.other_pc = other_pc;
  e.has_thread = lane >= 0;
  if (e.has_thread) e.thread = thread(warp, lane);
  e.block = block.id;
  return &e;
}

}  // namespace gpt2fast::ptx
