"""The short way of a call past the dispatcher: its results, its gradients, and which calls may not take it. CPU tensors
take it here: inside the PTX machine as a GPU's do, and where native kernels are hidden."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast import direct, ops
from gpt2fast.backends import choose, use_backend
from gpt2fast.dtypes import dtype_name
from gpt2fast.op import OPS, op
from gpt2fast.registration import FLOATING
from gpt2fast.testing import assert_close_to_truth, ptx
from gpt2fast.testing.contract import name_of
from gpt2fast.testing.inputs import build, reference, truth, work

pytestmark = pytest.mark.usefixtures("ops_as_before")


@pytest.fixture
def machine():
    with ptx.machine() as machine:
        yield machine


def gradients(call, args):
    leaves = {n: v.clone().requires_grad_() for n, v in args.items() if isinstance(v, Tensor) and v.is_floating_point()}
    out = call(**args | leaves)
    out = out if isinstance(out, tuple) else (out,)
    sum(o.double().square().sum() for o in out).backward()
    return out, [leaf.grad for leaf in leaves.values()]


@pytest.mark.parametrize("name", ("layer_norm", "add_layer_norm", "linear", "gelu", "embedding", "cross_entropy"))
def test_results_and_gradients_are_the_dispatchers(machine, name, monkeypatch):
    declared = OPS[name]
    args = build(declared, declared.cases[-2], torch.float32)
    gone = []
    monkeypatch.setattr(direct, "run", lambda *a, run=direct.run: gone.append(run(*a)) or gone[-1])
    found = gradients(declared, args)
    assert gone and not any(out is NotImplemented for out in gone)
    monkeypatch.setattr(direct, "run", lambda *a: NotImplemented)
    expected = gradients(declared, args)
    for ours, others in zip(found, expected):
        torch.testing.assert_close(ours, others)


def test_what_autograd_sees(machine):
    x, weight, bias = torch.randn(3, 8, requires_grad=True), torch.randn(8, 4), torch.randn(4)
    assert ops.layer_norm(x, torch.ones(8), torch.zeros(8)).grad_fn.name() == "layer_normBackward"
    # PyTorch's own autograd differentiates the product as well as ours, in less time.
    assert "gpt2fast" not in ops.linear(x, weight, bias).grad_fn.name().lower()
    y = ops.linear(x, weight, bias, activation="gelu_tanh")  # PyTorch would keep what ours recomputes
    assert y.grad_fn.name() == "linearBackward"
    assert not ops.linear(x.detach(), weight, bias).requires_grad


def test_an_output_that_nobody_uses_has_a_zero_gradient(machine):
    args = build(OPS["add_layer_norm"], dict(B=1, T=5, C=64), torch.float32)
    grads = []
    for which in (0, 1):
        x = args["x"].clone().requires_grad_()
        out = ops.add_layer_norm(**args | dict(x=x))
        out[which].square().sum().backward()
        grads.append(x.grad)
    _, (whole, *_) = gradients(OPS["add_layer_norm"], args)
    torch.testing.assert_close(grads[0] + grads[1], whole)


def test_arguments_by_name_and_those_that_do_not_fit(machine):
    x, weight, bias = torch.randn(2, 8), torch.ones(8), torch.zeros(8)
    torch.testing.assert_close(
        ops.layer_norm(x, bias=bias, weight=weight, eps=1e-3), ops.layer_norm(x, weight, bias, 1e-3)
    )
    for args, kwargs in (((x, weight), {}), ((x, weight, bias), dict(epsilon=1)), ((x, weight, bias, 1e-5, 1), {})):
        with pytest.raises((TypeError, RuntimeError), match="layer_norm"):
            ops.layer_norm(*args, **kwargs)
    with pytest.raises(ValueError, match=r"weight must have shape \(C,\) = \(8,\), got \(4,\)"):
        ops.layer_norm(x, weight[:4], bias)


class Own(Tensor):
    pass


def test_who_takes_the_dispatchers_way(machine):
    x, weight, bias = torch.randn(2, 8), torch.ones(8), torch.zeros(8)
    call = OPS["layer_norm"], (x, weight, bias), {}
    assert direct.run(*call) is not NotImplemented
    assert direct.run(call[0], (x, weight.as_subclass(Own), bias), {}) is NotImplemented
    with torch.autocast("cpu", torch.bfloat16):
        assert direct.run(*call) is NotImplemented
        assert ops.linear(x, torch.randn(8, 4)).dtype == torch.bfloat16
    with torch.autograd.forward_ad.dual_level():
        assert direct.run(*call) is NotImplemented
    with FlopCounterMode(display=False):
        assert direct.run(*call) is NotImplemented
    seen = []
    torch.vmap(lambda x: seen.append(direct.run(call[0], (x, weight, bias), {})) or x)(x)
    assert seen == [NotImplemented]
    needy = dict(build(OPS["layer_norm_backward"], dict(B=1, T=2, C=8), torch.float32))
    needy["x"].requires_grad_()
    assert direct.run(OPS["layer_norm_backward"], (), needy) is NotImplemented  # it has no derivative, and says so
    assert direct.run(OPS["layer_norm"], (x.to("meta"), weight, bias), {}) is NotImplemented


def test_in_place_ops_and_those_with_a_cuda_kernel_of_their_own_take_the_dispatchers_way(machine):
    @op(shapes=dict(x="... C"), cases=[], mutates=["x"], namespace="gpt2fast_test")
    def double_(x: Tensor) -> None:
        """Doubles x in place."""
        x.mul_(2)

    x = torch.ones(3)
    version = x._version
    assert direct.run(double_, (x,), {}) is NotImplemented
    double_(x)
    assert x.tolist() == [2, 2, 2] and x._version > version

    @op(shapes=dict(x="... C"), cases=[], namespace="gpt2fast_test")
    def tripled(x: Tensor) -> Tensor:
        """3 x."""
        return 3 * x

    assert direct.run(tripled, (x,), {}).tolist() == [6, 6, 6]
    library = torch.library.Library("gpt2fast_test", "IMPL")
    library.impl("tripled", lambda x: x + x + x, "CUDA")
    assert direct.run(tripled, (x,), {}) is NotImplemented
    library._destroy()


@pytest.mark.parametrize("bias", (False, True))
def test_columns_that_are_added_for_a_gpus_matrix_units_change_nothing(bias, monkeypatch):
    import sys

    from gpt2fast.ops import linear as op_linear  # the op

    module = sys.modules["gpt2fast.ops.linear"]
    x, weight = torch.randn(4, 5, 16), torch.randn(33, 16)
    args = dict(x=x, weight=weight, bias=torch.randn(33) if bias else None, transposed=True)
    want = dict(dy=torch.randn(4, 5, 33), x=x, weight=weight, transposed=True)
    expected = op_linear.fused(**args)[0], module._fused_backward(**want)
    monkeypatch.setattr(module, "_missing", lambda x, columns: -columns % 8)
    found = op_linear.fused(**args)[0], module._fused_backward(**want)
    assert found[0].is_contiguous() and all(g.is_contiguous() for g in found[1])
    for ours, others in zip(found, expected):
        torch.testing.assert_close(ours, others)


RETURNS = [
    pytest.param(declared, case, id=f"{declared.name}-{name_of(case)}")
    for declared in OPS.values()
    if declared.fused_returns is not None
    for case in declared.cases
    if work(declared, case) < 1e8
]


@pytest.mark.parametrize("dtype", FLOATING, ids=dtype_name)
@pytest.mark.parametrize("declared, case", RETURNS)
def test_outputs_without_those_for_a_backward_pass_keep_the_rule(declared, case, dtype, monkeypatch):
    """``fused_returns`` runs where autograd does not record a call, on the CPU without native kernels too."""
    args = build(declared, case, dtype)
    with use_backend("fused"):
        choice = choose(declared, **args)
        ran, short = [], declared.fused_returns
        monkeypatch.setattr(declared, "fused_returns", lambda *a, **k: ran.append(1) or short(*a, **k))
        found = declared(*args.values())
    assert len(ran) == (choice.backend == "fused")
    found = found if isinstance(found, tuple) else (found,)
    plain, true = reference(declared, args), truth(declared, args)
    assert len(found) == len(declared.returns)
    for name, *numbers in zip(declared.returns, found, plain, true):
        assert_close_to_truth(*numbers, name)
        assert numbers[0].is_contiguous() and numbers[0].dtype == numbers[1].dtype


def test_without_native_kernels_a_cpu_call_goes_directly_unless_autograd_records_it():
    x, weight, bias = torch.randn(2, 64), torch.ones(64), torch.zeros(64)
    call = OPS["layer_norm"], (x, weight, bias), {}
    assert direct.run(*call) is NotImplemented  # the native kernel is at the dispatcher's key
    with use_backend("fused"):
        assert [out.shape for out in direct.run(*call)] == [x.shape]
        weight.requires_grad_()
        assert direct.run(*call) is NotImplemented
        assert ops.layer_norm(x, weight, bias).grad_fn is not None
        with torch.no_grad():
            assert direct.run(*call) is not NotImplemented
        weight.requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16):
            assert direct.run(*call) is NotImplemented
        with pytest.raises(ValueError, match=r"weight must have shape \(C,\) = \(64,\), got \(4,\)"):
            ops.layer_norm(x, weight[:4], bias)
    with use_backend("reference"):
        assert len(direct.run(*call)) == 3
