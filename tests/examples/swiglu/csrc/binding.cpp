// SwiGLU for torch's tensors. A call was checked before, by what the op's declaration in Python says.
#include "torch/binding.h"

#include "args.h"

GPT2FAST_CPU_KERNEL(swiglu, SwigluArgs)

namespace {

using namespace gpt2fast;

Tensor run(const Tensor& gate, const Tensor& up) {
  auto gate_c = gate.expect_contiguous(), up_c = up.expect_contiguous();
  Tensor y = empty_output(gate.sizes(), gate.scalar_type());
  SwigluArgs args{
      .gate = gate_c->const_data_ptr(),
      .up = up_c->const_data_ptr(),
      .y = y.data_ptr(),
      .n = y.numel(),
      .dtype = dtype_of(gate),
  };
  launch(swiglu, args);
  return y;
}

TORCH_LIBRARY_IMPL(examples, CPU, m) { bind<run>(m, "swiglu"); }

}  // namespace
