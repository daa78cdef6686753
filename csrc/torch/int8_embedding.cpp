// int8_embedding for CPU tensors: checks the size of the table, allocates out, and launches the kernel.
#include "binding.h"

namespace gpt2fast {
namespace {

Tensor int8_embedding(const Tensor& tokens, const Tensor& wte, const Tensor& scale, const Tensor& wpe,
                      const OptionalTensor& positions, const OptionalTensor& token_types, int64_t start) {
  int64_t B = tokens.size(0), T = tokens.size(1), C = wpe.size(1), V = scale.size(0);
  int64_t blocks = (V + kPackedOutputs - 1) / kPackedOutputs, groups = (C + kPackedInputs - 1) / kPackedInputs;
  TORCH_CHECK_VALUE(wte.size(0) == blocks && wte.size(1) == groups, "gpt2fast::int8_embedding: wte must have ", blocks,
                    " blocks of 16 rows and ", groups, " groups of 32 columns for ", V, " rows and ", C,
                    " columns, got ", wte.size(0), " and ", wte.size(1));
  auto tokens_c = tokens.expect_contiguous(), wte_c = wte.expect_contiguous(), scale_c = scale.expect_contiguous();
  auto wpe_c = wpe.expect_contiguous();
  OptionalTensor positions_c = contiguous(positions), types_c = contiguous(token_types);
  Tensor out = empty_output({B, T, C}, wpe.scalar_type());
  PackedEmbeddingArgs args{
      .tokens = tokens_c->const_data_ptr<int64_t>(),
      .positions = data<int64_t>(positions_c),
      .token_types = data<int64_t>(types_c),
      .wte = wte_c->const_data_ptr<uint8_t>(),
      .scale = scale_c->const_data_ptr<float>(),
      .wpe = wpe_c->const_data_ptr(),
      .out = out.data_ptr(),
      .B = B,
      .T = T,
      .C = C,
      .V = V,
      .P = wpe.size(0),
      .start = start,
      .positions_stride_b = positions && positions->size(0) != 1 ? T : 0,
      .stride_wpe = C,
      .dtype = dtype_of(wpe),
  };
  launch(&cpu::Table::int8_embedding, args);
  return out;
}

TORCH_LIBRARY_IMPL(gpt2fast, CPU, m) { bind<int8_embedding>(m, "int8_embedding"); }

}  // namespace
}  // namespace gpt2fast
