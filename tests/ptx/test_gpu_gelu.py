"""GELU on the PTX machine, in Triton and in CUDA C++: both tails, and rows of any stride."""

import pytest
import torch
from both import kernels_of

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth
from gpt2fast.testing.inputs import reference, truth

FORMS = ("tanh", "none")
NAMES = ("gelu", "bias_gelu", "gelu_backward")
run = kernels_of("gelu")


@pytest.mark.parametrize("form", FORMS)
def test_tails(run, form):
    """From the smallest numbers to the largest: NaN only where PyTorch has one, and correct last digits near 0."""
    size = torch.logspace(-38, 38, 200)
    x = torch.cat([size, -size, torch.linspace(-12, 12, 601), torch.tensor([0.0, -0.0, torch.nan])])
    args = dict(x=x, approximate=form)
    y, _ = run("gelu", args)
    back = dict(dy=torch.ones_like(x), x=x, approximate=form)
    dx, _ = run("gelu_backward", back)
    assert y.isnan().tolist() == dx.isnan().tolist() == x.isnan().tolist()
    for part in (x.abs() < 1e-3, (x.abs() >= 1e-3) & (x.abs() < 1), (x.abs() >= 1) & (x.abs() < 20)):
        assert_close_to_truth(y[part], reference(OPS["gelu"], args)[0][part], truth(OPS["gelu"], args)[0][part])
        exact, plain = truth(OPS["gelu_backward"], back)[0][part], reference(OPS["gelu_backward"], back)[0][part]
        assert_close_to_truth(dx[part], plain, exact)
    far = x.abs() >= 20
    assert torch.equal(y[far], x[far].clamp(min=0)) and torch.equal(dx[far], (x[far] > 0).float())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_layouts(run, name, form):
    wide = torch.randn(6, 4, 2, 70, generator=torch.Generator().manual_seed(0)).bfloat16()
    for x in (
        wide[..., :33],
        wide[:, :, 0],
        wide.transpose(0, 1),
        wide[..., ::2],
        wide[0, 0, 0],
        wide[:0],
        wide[..., :0],
    ):
        args = dict(x=x, approximate=form)
        if name == "bias_gelu":
            args["bias"] = torch.randn(2 * x.shape[-1]).bfloat16()[::2]
        if name == "gelu_backward":
            args["dy"] = torch.randn(x.shape).bfloat16()
        y, _ = run(name, args)
        assert y.shape == x.shape and y.is_contiguous()
        assert_close_to_truth(y, reference(OPS[name], args)[0], truth(OPS[name], args)[0])
