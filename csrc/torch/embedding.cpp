// embedding for CPU tensors: allocates out, fills EmbeddingArgs, and launches the kernel.
#include "binding.h"

namespace gpt2fast {
namespace {

Tensor embedding(const Tensor& tokens, const Tensor& wte, const Tensor& wpe, const OptionalTensor& positions,
                 const OptionalTensor& token_types, int64_t start) {
  auto tokens_c = tokens.expect_contiguous(), wte_c = wte.expect_contiguous(), wpe_c = wpe.expect_contiguous();
  OptionalTensor positions_c = contiguous(positions), types_c = contiguous(token_types);
  int64_t B = tokens.size(0), T = tokens.size(1), C = wte.size(1);
  Tensor out = empty_output({B, T, C}, wte.scalar_type());
  EmbeddingArgs args{
      .tokens = tokens_c->const_data_ptr<int64_t>(),
      .positions = data<int64_t>(positions_c),
      .token_types = data<int64_t>(types_c),
      .wte = wte_c->const_data_ptr(),
      .wpe = wpe_c->const_data_ptr(),
      .out = out.data_ptr(),
      .B = B,
      .T = T,
      .C = C,
      .V = wte.size(0),
      .P = wpe.size(0),
      .start = start,
      .positions_stride_b = positions && positions->size(0) != 1 ? T : 0,
      .stride_wte = C,
      .stride_wpe = C,
      .dtype = dtype_of(wte),
  };
  launch(&cpu::Table::embedding, args);
  return out;
}

TORCH_LIBRARY_IMPL(gpt2fast, CPU, m) { bind<embedding>(m, "embedding"); }

}  // namespace
}  // namespace gpt2fast
