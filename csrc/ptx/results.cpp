#include "results.h"

namespace gpt2fast::ptx {
namespace {

constexpr const char* kClassNames[kClasses] = {"int",     "float",  "half",    "convert",
                                               "special", "tensor", "control", "memory"};
constexpr const char* kUses[] = {"load", "store", "atomic"};

void add_global(Counters& to, Use use, const Counts& c) {
  std::string name = std::string("global_") + kUses[int(use)] + "_";
  to[name + "requests"] += c.requests;
  to[name + "bytes"] += c.bytes;
  to[name + "sectors"] += c.sectors;
  to[name + "ideal_sectors"] += c.ideal_sectors;
}

void add_shared(Counters& to, Use use, const Counts& c) {
  std::string name = std::string("shared_") + kUses[int(use)] + "_";
  to[name + "requests"] += c.requests;
  to[name + "bytes"] += c.bytes;
  to[name + "wavefronts"] += c.wavefronts;
  to[name + "bank_conflicts"] += c.bank_conflicts;
}

// cp.async loads from global and stores to shared memory.
Use shared_use(const Instruction& i) { return i.copies ? Use::Write : i.use; }

}  // namespace

Counters counters(const Launch& launch) {
  Counters c;
  for (Use use : {Use::Read, Use::Write, Use::Atomic}) {
    add_global(c, use, {});
    add_shared(c, use, {});
  }
  for (const char* name : kClassNames) c[std::string(name) + "_instructions"] = 0;
  for (size_t pc = 0; pc < launch.module.code.size(); ++pc) {
    if (!launch.warp_counts[pc]) continue;
    const Instruction& i = launch.module.code[pc];
    c["warp_instructions"] += launch.warp_counts[pc];
    c["thread_instructions"] += launch.thread_counts[pc];
    c[std::string(kClassNames[int(i.kind)]) + "_instructions"] += launch.warp_counts[pc];
    add_global(c, i.use, launch.global_counts[pc]);
    add_shared(c, shared_use(i), launch.shared_counts[pc]);
  }
  c["tensor_flops"] = launch.tensor_flops;
  c["barriers"] = launch.barriers;
  c["divergent_branches"] = launch.divergent_branches;
  return c;
}

std::map<std::string, Counters> counters_per_source(const Launch& launch) {
  std::map<std::string, Counters> all;
  for (size_t pc = 0; pc < launch.module.code.size(); ++pc) {
    const Counts &global = launch.global_counts[pc], &shared = launch.shared_counts[pc];
    if (!global.requests && !shared.requests) continue;
    const Instruction& i = launch.module.code[pc];
    std::string source = launch.module.source_of(i);
    Counters& c = all[source.empty() ? "PTX line " + std::to_string(i.line) : source];
    if (global.requests) add_global(c, i.use, global);
    if (shared.requests) add_shared(c, shared_use(i), shared);
  }
  return all;
}

std::map<std::string, Counters> counters_per_buffer(const Launch& launch) {
  std::map<std::string, Counters> all;
  for (const Buffer& b : launch.buffers) {
    Counters& c = all[b.name];
    c["read_bytes"] += b.traffic.read_bytes;
    c["written_bytes"] += b.traffic.written_bytes;
    c["read_sectors"] += b.traffic.read_sectors;
    c["written_sectors"] += b.traffic.written_sectors;
  }
  return all;
}

}  // namespace gpt2fast::ptx
