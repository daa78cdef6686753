"""A drop-in GPT-2 on the PTX machine, forward and backward. Triton runs the ops that it has kernels for, PyTorch the
rest."""

import copy

import pytest
import torch
from hf_models import trio

import gpt2fast
from gpt2fast import backends, ops
from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth, ptx

pytest.importorskip("triton")


def gradients(model, ids):
    loss = model(ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_forward_and_backward(dtype):
    plain, ours, truth = trio(dtype=dtype, attn_pdrop=0.0)
    ids = torch.randint(0, plain.config.vocab_size, (2, 19), generator=torch.Generator().manual_seed(0))
    with ptx.machine() as machine:
        report = gpt2fast.report(copy.deepcopy(ours).train())
        found = gradients(ours, ids)
    layers = plain.config.n_layer
    launched = [launch.kernel for launch in machine.launches]
    assert launched.count("layer_norm_kernel") == launched.count("layer_norm_backward_kernel") == 2 * layers + 1
    assert report["transformer.ln_f"].backend == report["transformer.ln_f"].backward == "triton"
    assert report["transformer.h.0.attn"].backend == report["transformer.h.0.attn"].backward == "triton"
    names = ["loss", *(n for n, _ in plain.named_parameters())]
    for name, *tensors in zip(names, found, gradients(plain, ids), gradients(truth, ids)):
        assert_close_to_truth(*tensors, name)


def test_inside_the_machine_cpu_tensors_count_as_cuda_tensors(monkeypatch):
    x, weight = torch.randn(2, 64), torch.ones(64)
    with ptx.machine() as machine:
        assert backends.choose(OPS["layer_norm"], x, weight, weight).backend == "triton"
        assert backends.choose(OPS["linear"], x, x, transposed=True).backend == "fused"
        ops.layer_norm(x, weight, weight)
        assert backends.choose(OPS["layer_norm"], x.double(), weight.double(), weight.double()).backend == "fused"
        with backends.use_backend("triton"):
            ops.layer_norm(x, weight, weight)
            monkeypatch.delitem(backends.BACKENDS["triton"].kernels.modules, "sample")
            said = (
                "gpt2fast::sample: backend 'triton' does not cover this call: the triton backend has no kernel for it"
            )
            with pytest.raises(RuntimeError, match=said):
                ops.sample(x, torch.tensor([1]), torch.tensor([2, 3]))
    assert len(machine.launches) == 2
    assert backends.choose(OPS["layer_norm"], x, weight, weight).backend == "cpu"
    with pytest.raises(RuntimeError, match="'triton' cannot be used: there is no CUDA device, and no .*machine"):
        backends.use_backend("triton")


def test_every_module_of_kernels_holds_what_it_is_listed_for():
    import importlib

    from gpt2fast.kernels import MODULES

    for module in set(MODULES.values()):
        held = importlib.import_module(f"gpt2fast.kernels.{module}").KERNELS
        assert set(held) == {name for name, where in MODULES.items() if where == module}
        assert set(held) <= set(OPS)
