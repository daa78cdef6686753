"""The backward pass of the MLP in Triton on the PTX machine: which backend runs it. Results: test_gpu_mlp.py."""

import copy

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

import triton
from transformers import GPT2Config, GPT2LMHeadModel

import gpt2fast
from gpt2fast import GPT2, Config, backends, use_backend
from gpt2fast.kernels import linear
from gpt2fast.kernels import mlp as kernels
from gpt2fast.op import OPS
from gpt2fast.ops.mlp import trains_as_one
from gpt2fast.testing import assert_close_to_truth, ptx
from gpt2fast.testing.inputs import build

SIZES = dict(n_layer=2, n_embd=48, n_head=3, vocab_size=97, n_positions=40)
BIASES = dict(bias_in=True, bias_out=True, keep=True)


# Bytes that a Triton other than the newest spills, by (version, rows, architecture).
SPILLS = {("3.6.0", 10, "sm_80"): 8}


def test_the_spills_of_large_tiles_are_none():
    for T in (600, 100, 10):
        args = build(OPS["mlp_backward"], dict(B=1, T=T, K=32, M=128, N=64, **BIASES), torch.bfloat16)
        with ptx.machine() as machine:
            kernels.mlp_backward(**args | dict(want="dbias_in"))
        for arch in ("sm_80", "sm_90", "sm_100"):
            expected = SPILLS.get((triton.__version__, T, arch), 0)
            assert machine.launches[0].resources(arch).spill_stores == expected, (T, arch)


def trained(model, ids):
    """The loss and the gradients of one step."""
    model.zero_grad()
    out = model(ids, targets=ids) if isinstance(model, GPT2) else model(ids, labels=ids).loss
    out.backward()
    return [out.detach(), *(p.grad for p in model.parameters())]


def native():
    torch.manual_seed(0)
    return GPT2(Config(**SIZES, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, initializer_range=0.2))


def drop_in():
    torch.manual_seed(0)
    config = GPT2Config(**SIZES, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, initializer_range=0.2)
    return gpt2fast.optimize(GPT2LMHeadModel(config)).train()


@pytest.mark.parametrize("make", (native, drop_in))
def test_models_train_with_it(make):
    """The derivative of the activation has no launch of its own, and the gradients are those of the references."""
    ours = make()
    plain, true = copy.deepcopy(ours), copy.deepcopy(ours).double()
    ids = torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(1))
    with ptx.machine() as machine, use_backend("triton"):
        found = trained(ours, ids)
    with use_backend("reference"):
        near, exact = trained(plain, ids), trained(true, ids)
    names = ("loss", *dict(ours.named_parameters()))
    for name, *three in zip(names, found, near, exact):
        assert_close_to_truth(*three, name)
    assert "gelu_backward_kernel" not in {launch.kernel for launch in machine.launches}


def test_it_is_the_choice_where_linear_is(monkeypatch):
    """By default, two layers run on PyTorch's products, until ours are measured faster for a shape."""
    x, w_in, w_out = torch.randn(2, 11, 48), torch.randn(48, 192), torch.randn(192, 48)
    args = x, x, w_in, w_out, x, x
    with ptx.machine():
        assert not trains_as_one(x, x, w_in, w_out)
        choice = backends.choose(OPS["mlp_backward"], *args)
        assert choice.backend == "fused" and choice.why.startswith("PyTorch's product is the choice")
        monkeypatch.setattr(linear, "MEASURED_FASTER", {(None, torch.float32, 22, 192, 48)})
        assert backends.choose(OPS["mlp_backward"], *args).backend == "triton"
        assert trains_as_one(x, x, w_in, w_out)


@pytest.mark.parametrize("case", ("dropout", "autocast", "no gradients", "cpu"))
def test_two_layers_run_where_it_would_be_wrong_or_useless(case, monkeypatch):
    """Dropout comes between the product and the residual. Autocast keeps the residual's dtype."""
    called = []
    monkeypatch.setattr(gpt2fast.ops, "mlp", lambda *args, **kwargs: called.append(args))
    model, ids = native(), torch.randint(97, (2, 11))
    if case == "cpu":
        trained(model, ids)
    else:
        for block in model.h:
            block.mlp.resid_pdrop = 0.1 if case == "dropout" else 0.0
        with ptx.machine(), use_backend("triton"), torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
            with torch.set_grad_enabled(case != "no gradients"):
                model(ids)
    assert not called
