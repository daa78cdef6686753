// cross_entropy for CPU tensors: the kernel gives the rows' losses, and this file reduces them.
#include "binding.h"

namespace gpt2fast {
namespace {

// The sum or the mean of the rows' losses, in float64. The mean is over the rows whose target is not ignore_index.
double reduce(const float* losses, const int64_t* targets, int64_t R, int64_t ignore_index, bool mean) {
  double total = 0;
  int64_t count = 0;
  for (int64_t r = 0; r < R; ++r) total += losses[r], count += targets[r] != ignore_index;
  return mean ? total / double(count) : total;
}

std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& targets, int64_t ignore_index,
                                         double label_smoothing, std::string_view reduction) {
  Rows rows(logits);
  Tensor targets_c = targets.contiguous();
  int64_t R = logits.size(0);
  Tensor loss = empty_output({R}, at::kFloat), lse = empty_output({R}, at::kFloat);
  CrossEntropyArgs args{
      .logits = rows.data,
      .targets = targets_c.const_data_ptr<int64_t>(),
      .loss = loss.data_ptr<float>(),
      .lse = lse.data_ptr<float>(),
      .R = R,
      .V = logits.size(1),
      .stride_logits_r = rows.stride,
      .ignore_index = ignore_index,
      .label_smoothing = float(label_smoothing),
      .dtype = dtype_of(logits),
  };
  launch(&cpu::Table::cross_entropy, args);
  if (reduction == "none") return {loss, lse};
  Tensor reduced = empty_output({}, at::kFloat);
  *reduced.data_ptr<float>() = float(reduce(args.loss, args.targets, R, ignore_index, reduction == "mean"));
  return {reduced, lse};
}

TORCH_LIBRARY_IMPL(gpt2fast, CPU, m) { bind<cross_entropy>(m, "cross_entropy"); }

}  // namespace
}  // namespace gpt2fast
