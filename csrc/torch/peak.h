// One measurement of csrc/cpu/peak.h, for benchmarks/peak.py. It is timed here, so that no Python is part of the time.
#pragma once
#include <chrono>

#include "declaration.h"
#include "launch.h"

namespace gpt2fast {

// Returns seconds, and the bytes moved or operations done in them. x and y are (n,) float32; y is for copies only, and
// repeats for "fma" and "dot" only.
inline std::tuple<double, double> measure_peak(const std::string& what, const Tensor& x, const OptionalTensor& y,
                                               int64_t repeats) {
  static const std::pair<const char*, cpu::Peak> kNames[] = {{"read", cpu::Peak::kRead},
                                                             {"copy", cpu::Peak::kCopy},
                                                             {"stream", cpu::Peak::kStream},
                                                             {"fma", cpu::Peak::kFma},
                                                             {"dot", cpu::Peak::kDot}};
  const auto* found = std::find_if(std::begin(kNames), std::end(kNames), [&](auto& n) { return what == n.first; });
  TORCH_CHECK_VALUE(found != std::end(kNames), "gpt2fast: peak must be read, copy, stream, fma or dot, got ", what);
  cpu::Peak peak = found->second;
  bool copies = peak == cpu::Peak::kCopy || peak == cpu::Peak::kStream;
  bool computes = peak == cpu::Peak::kFma || peak == cpu::Peak::kDot;
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat && x.is_contiguous() && x.numel() >= (1 << 16),
                   "gpt2fast: peak's x must be contiguous float32 of at least 65536 elements");
  TORCH_CHECK_VALUE(!copies || (y && y->is_contiguous() && y->sizes() == x.sizes() && y->dtype() == x.dtype()),
                    "gpt2fast: peak's y must be like x");
  int64_t tasks = at::get_num_threads();
  std::vector<float> sink(tasks);
  cpu::PeakArgs args = {
      peak,   x.const_data_ptr<float>(), copies ? y->mutable_data_ptr<float>() : nullptr, sink.data(), x.numel(), tasks,
      repeats};
  auto start = std::chrono::steady_clock::now();
  launch(&cpu::Table::peak, args);
  double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  double flops = double(cpu::table().peak_flops) * double(repeats) * double(tasks) * (peak == cpu::Peak::kDot ? 2 : 1);
  return {seconds, computes ? flops : double(x.nbytes()) * (copies ? 2 : 1)};
}

}  // namespace gpt2fast
