// The counters of a launch, under the names that Python sees.
#pragma once
#include "machine.h"

namespace gpt2fast::ptx {

using Counters = std::map<std::string, uint64_t>;

Counters counters(const Launch& launch);
// The counters of the instructions that access memory, by "file:line".
std::map<std::string, Counters> counters_per_source(const Launch& launch);
std::map<std::string, Counters> counters_per_buffer(const Launch& launch);

}  // namespace gpt2fast::ptx
