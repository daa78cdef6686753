// The findings of a launch. There is one for each kind and pair of places; repeated ones are only counted.
#include <algorithm>
#include <functional>

#include "machine.h"

namespace gpt2fast::ptx {
namespace {

constexpr size_t kMostErrors = 16;
constexpr uint64_t kSpin = 1'000'000;  // instructions

}  // namespace

// The key of a finding. Findings of one source line, or of one pair of lines, have the same key, however many
// instructions the line has. Without source lines each instruction counts for itself.
uint64_t Launch::key(const char* kind, uint32_t pc, uint32_t other_pc) const {
  auto place = [&](uint32_t at) {
    if (at == kNone) return std::string();
    std::string source = module.source_of(module.code[at]);
    return source.empty() ? std::to_string(at) : source;
  };
  std::string a = place(pc), b = place(other_pc);
  if (b < a && b.find(':') != std::string::npos) std::swap(a, b);
  return std::hash<std::string>{}(std::string(kind) + ' ' + a + ' ' + b);
}

std::string Launch::place(uint32_t pc) const {
  const Instruction& i = module.code[pc];
  std::string source = module.source_of(i);
  return "line " + std::to_string(i.line) + (source.empty() ? "" : " (" + source + ")");
}

bool Launch::repeats(const char* kind, uint32_t pc, uint32_t other_pc) {
  auto it = reported.find(key(kind, pc, other_pc));
  if (it == reported.end()) return false;
  ++error_count;
  if (it->second < errors.size()) ++errors[it->second].count;
  return true;
}

Error* Launch::report(const char* kind, const std::string& message, const Warp& warp, uint32_t pc, int lane,
                      uint32_t other_pc) {
  if (repeats(kind, pc, other_pc)) return nullptr;
  ++error_count;
  bool full = errors.size() >= kMostErrors;
  reported.emplace(key(kind, pc, other_pc), full ? kNone : errors.size());
  if (full) return nullptr;
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

void Launch::note(const char* kind, const std::string& message, const Warp& warp, uint32_t pc) {
  for (Error& known : notes)
    if (known.kind == kind && known.pc == pc) return void(++known.count);
  if (notes.size() >= kMostErrors) return;
  Error& e = notes.emplace_back();
  e.kind = kind;
  e.message = message;
  e.pc = pc;
  e.has_thread = true;
  e.thread = thread(warp, 0);
  e.block = block.id;
}

// Reports that the budget of instructions is used up. A block that reads the same place again and again, while nothing
// changes it, is waiting for another block.
void Launch::report_budget(const Warp& w) {
  std::string message = "the launch was stopped after " + std::to_string(config.budget) + " warp instructions";
  uint64_t blocks = uint64_t(config.grid[0]) * config.grid[1] * config.grid[2];
  bool waits = blocks > 1 && polled != kNone && quiet >= std::min(config.budget / 2, kSpin);
  if (waits)
    message += ": the block waits for another block; it reads memory at " + place(polled) +
               " again and again and changes nothing. Blocks run one after the other here, so a block can wait only "
               "for those before it";
  report("budget", message, w, waits ? polled : w.pc, -1);
  stop();
}

}  // namespace gpt2fast::ptx
