"""Layer norm in Triton on the PTX machine: parity by the project's rule, exact bytes, registers as really compiled."""

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast.kernels import layer_norm as kernels
from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth, ptx
from gpt2fast.testing.inputs import build, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", ("layer_norm", "add_layer_norm"))
def test_forward(name, dtype):
    op, (run, supports) = OPS[name], kernels.KERNELS[name]
    args = build(op, dict(B=2, T=5, C=770), dtype)
    assert supports(**args) is None
    with ptx.machine():
        found = run(**args)
    for what, actual, plain, truth in zip(op.outputs, found, reference(op, args), reference(op, args, torch.float64)):
        assert_close_to_truth(actual, plain, truth, f"{name} {what}")
