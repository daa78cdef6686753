"""The choice of backends: what runs a call, how a backend is named, added and refused, and what strict means."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import flops, op_cases

from gpt2fast import backends, ops, shapes
from gpt2fast.backends import BACKENDS, Backend, Kernel, choose, use_backend
from gpt2fast.op import OPS
from gpt2fast.testing import build, call, lacks, targets_of

X = torch.randn(2, 3, 8)


def small(op):
    return build(op, next(c for c in op.cases if 0 < flops(op, c) <= 100_000))


@pytest.fixture
def mine():
    """A user's own backend for layer_norm's backward, which the C++ backend lacks. It counts its calls."""
    calls = []

    def run(dy, x, weight, mean, rstd):
        calls.append(x.dtype)
        return OPS["layer_norm_backward"].fused(dy, x, weight, mean, rstd)

    def supports(dy, x, weight, mean, rstd):
        return None if x.dtype == torch.float32 else f"mine covers float32 only, got {x.dtype}"

    kernels = {"layer_norm_backward": Kernel(run, supports)}
    with backends.register(Backend("mine", ("cpu",), lambda: None, kernels)):
        yield calls


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_choose_says_what_runs(op):
    choice = choose(op, **op.example())
    if backends.is_native(op):
        assert choice.backend == "cpu" and choice.why is None
        assert choose(op, **small(op)).backend == "cpu"
    else:
        assert choice.backend == "fused" and choice.run is op.fused
        assert choice.why == "the cpu backend has no kernel for it"


def test_what_pytorchs_fused_way_does_not_compute_runs_the_reference_and_says_why():
    q, seed = torch.randn(1, 40, 2, 8), torch.tensor([1])
    out, lse = OPS["attention"].overload(q, q, q)
    backward = dict(dout=out, q=q, k=q, v=q, out=out, lse=lse)
    few = {name: t[..., :20] if name == "lse" else t[:, :20] for name, t in backward.items()}
    short = dict(dy=X, x=X, weight=torch.ones(8), mean=X[..., 0], rstd=X[..., 0])
    for name, args, why in (
        ("attention_backward", backward | dict(dropout_p=0.1, seed=seed), "has no dropout on the CPU"),
        ("attention_backward", backward | dict(bias=torch.zeros(1, 1, 1, 40)), "gives no gradient of a bias"),
        ("attention_backward", backward | dict(window=2), "under a window break the parity rule"),
        ("attention_backward", few, "up to 1024 pairs of query and key break the parity rule"),
        ("layer_norm_backward", short, "rows of up to 32 columns break the parity rule"),
    ):
        choice = choose(OPS[name], **args)
        assert choice.backend == "reference" and why in choice.why, (name, choice)
        assert (
            choose(OPS[name], **(backward if name == "attention_backward" else OPS[name].example())).backend == "fused"
        )
    choice = choose(OPS["attention"], *(t.to("meta") for t in (q, q, q)), device="xpu")
    assert choice.backend == "reference" and "on the CPU only" in choice.why


def lacks_kernels(op) -> bool:
    """Whether the C++ backend lacks a kernel for the op, and also for one of the ops that it is made of."""
    return not backends.is_native(op) and not (op.fused_calls and all(map(backends.is_native, op.fused_calls)))


@pytest.mark.parametrize("op", list(filter(lacks_kernels, OPS.values())), ids=lambda op: op.name)
def test_a_named_backend_is_strict_for_backward_ops_too(op):
    lacking = "|".join(o.name for o in (op, *op.fused_calls) if not backends.is_native(o))
    said = f"gpt2fast::({lacking}): backend 'cpu' does not cover this call: the cpu backend has no kernel for it"
    with use_backend("cpu"), pytest.raises(RuntimeError, match=said):
        call(op, small(op))


@pytest.mark.parametrize(
    "name, case", (("linear_cross_entropy", dict(R=37, K=70, V=771, ignore_index=3)), ("mlp", None))
)
def test_an_op_made_of_others_runs_on_a_named_backend_that_has_kernels_of_those(name, case):
    op = OPS[name]
    args = build(op, case) if case else small(op)
    choice = choose(op, **args)
    assert choice.backend == "fused" and choice.why == "the cpu backend has no kernel for it"
    expected = call(op, args)
    with use_backend("cpu"):
        assert choose(op, **args).run is op.fused
        for a, b in zip(call(op, args), expected):
            assert torch.equal(a, b)


def test_strict_backends_raise_inside_a_backward_pass():
    with use_backend("cpu"):
        y = ops.gelu(X.clone().requires_grad_())
        with pytest.raises(RuntimeError, match="gpt2fast::gelu_backward: backend 'cpu' does not cover this call"):
            y.sum().backward()


@pytest.mark.parametrize("name", ("fused", "reference"))
def test_built_in_ways_run_no_kernel(name, monkeypatch):
    seen = []

    def watched(op):
        function = getattr(op, name) or op.reference

        def run(*args, **kwargs):
            seen.append(op.name)
            return function(*args, **kwargs)

        return run

    for op in OPS.values():
        monkeypatch.setattr(op, name, watched(op))
    with use_backend(name):
        for op in OPS.values():
            args = small(op) if op.name != "attention_backward" else build(op, dict(B=1, T=40, S=40, H=2, D=8))
            call(op, args)
            assert op.name in seen
            assert choose(op, **args).backend == name


def test_the_first_backend_that_covers_a_call_runs_it(mine):
    op = OPS["layer_norm_backward"]
    args = small(op)
    assert choose(op, **args).backend == "mine"
    for a, b in zip(call(op, args), op.fused(**args)):
        assert torch.equal(a, b)
    assert mine == [torch.float32]
    wide = {n: t.double() for n, t in args.items()}
    choice = choose(op, **wide)
    assert choice.backend == "fused" and choice.objections == dict(
        cpu="the cpu backend has no kernel for it", mine="mine covers float32 only, got torch.float64"
    )
    with use_backend("mine"):
        x, weight = X.clone().requires_grad_(), torch.ones(8)
        with pytest.raises(RuntimeError, match="gpt2fast::layer_norm: backend 'mine' does not cover this call"):
            ops.layer_norm(x, weight, weight)
        with pytest.raises(RuntimeError, match="mine covers float32 only, got torch.float64"):
            call(op, wide)


def test_a_kernel_that_does_not_fit_its_op_is_named(monkeypatch):
    def wrong(dy, x):
        return x

    kernel = Kernel(wrong, lambda dy, x, approximate="tanh": None)
    monkeypatch.setitem(BACKENDS, "mine", Backend("mine", ("cpu",), lambda: None, dict(gelu_backward=kernel)))
    said = (
        "gpt2fast::gelu_backward: run of backend 'mine' must take the op's arguments (dy, x, approximate), got (dy, x)"
    )
    with pytest.raises(TypeError, match=re.escape(said)):
        OPS["gelu_backward"](X, X)


def test_supports_that_raises_is_named(monkeypatch):
    def supports(dy, x, approximate="tanh"):
        raise KeyError("tile")

    kernel = Kernel(lambda dy, x, approximate="tanh": x, supports)
    monkeypatch.setitem(BACKENDS, "mine", Backend("mine", ("cpu",), lambda: None, dict(gelu_backward=kernel)))
    said = "gpt2fast::gelu_backward: supports() of backend 'mine' raised KeyError('tile')"
    with pytest.raises(RuntimeError, match=re.escape(said)):
        OPS["gelu_backward"](X, X)


def test_unknown_backend_and_isa_are_refused():
    with pytest.raises(ValueError, match="backend must be one of auto, cpu, .*fused, reference, got 'cudnn'"):
        use_backend("cudnn")
    with pytest.raises(ValueError, match="CPU ISA must be one that this CPU runs .*, got 'sse9'"):
        backends._C.set_cpu_isa("sse9")


def test_a_switch_that_fails_leaves_the_old_backend_in_force(monkeypatch):
    with use_backend("reference"):
        monkeypatch.setitem(BACKENDS, "mine", Backend("mine", ("cpu",), lambda: "no licence", {}))
        with pytest.raises(RuntimeError, match="backend 'mine' cannot be used: no licence"):
            use_backend("mine")
        monkeypatch.setattr(backends, "_is_installed", lambda module: False)
        with pytest.raises(RuntimeError, match="'triton' cannot be used: triton is not installed; pip install triton"):
            use_backend("triton")
        assert backends.active() == "reference"
        assert choose(OPS["gelu"], X).backend == "reference"
    assert choose(OPS["gelu"], X).backend == "cpu"


def test_nested_switches_come_back():
    for name in ("fused", "cpu", "reference"):
        with use_backend(name):
            with use_backend("fused"):
                assert choose(OPS["gelu"], X).backend == "fused"
            assert backends.active() == name
            assert choose(OPS["gelu"], X).backend == name
    assert backends.active() == "auto" and choose(OPS["gelu"], X).backend == "cpu"
    assert backends.is_native(OPS["gelu"]) and not backends.is_native(OPS["gelu_backward"])


def test_another_device_than_the_backends_is_an_error():
    with use_backend("cpu"):
        said = "gpt2fast::gelu: backend 'cpu' does not cover this call: backend 'cpu' runs on cpu tensors, got cuda"
        with pytest.raises(RuntimeError, match=re.escape(said)):
            choose(OPS["gelu"], X, device="cuda")
    choice = choose(OPS["gelu"], X, device="xpu")
    assert choice.backend == "fused" and choice.why == "no backend of ours runs on xpu tensors"


@pytest.mark.parametrize("op, case", op_cases(100_000))
def test_right_arguments_pass_the_compiled_check(op, case, monkeypatch):
    """The slow check only makes the error messages. No correct call may need it."""
    args = build(op, case)
    monkeypatch.setattr(shapes, "check", None)
    op.check_call(**args)


@pytest.mark.skipif(not backends._has_amx(), reason="this CPU has no AMX, on which PyTorch's product would be faster")
def test_with_amx_training_runs_pytorchs_bfloat16_product_and_inference_ours():
    x, weight = torch.randn(40, 768).bfloat16(), torch.randn(768, 512).bfloat16().requires_grad_()
    ours, theirs = ops.linear(x, weight.detach()), OPS["linear"].fused(x, weight.detach())[0]
    assert not torch.equal(ours, theirs)
    assert torch.equal(ops.linear(x, weight), theirs)
    with torch.no_grad():
        assert torch.equal(ops.linear(x, weight), ours)
    with torch.inference_mode():
        assert torch.equal(ops.linear(x, weight.detach()), ours)
    assert torch.equal(ops.linear(x[:1], weight), ours[:1])  # with few rows our kernel runs
    with use_backend("cpu"):
        assert torch.equal(ops.linear(x, weight), ours)
    with backends.recording():
        choice = choose(OPS["linear"], x, weight)
    assert choice.backend == "fused" and choice.why == "in training PyTorch's bfloat16 product is faster: it uses AMX"
    assert choose(OPS["linear"], x, weight).backend == "cpu"


def test_an_overlay_warns_of_nothing():
    code = "import gpt2fast.ops; from gpt2fast import backends; backends.use_backend('reference')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_importing_the_package_imports_no_triton():
    code = """if True:
        import sys, torch, gpt2fast, gpt2fast.ops
        gpt2fast.ops.gelu(torch.randn(2, 3, requires_grad=True)).sum().backward()
        assert not [name for name in sys.modules if name.split(".")[0] in ("triton", "transformers")]"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_has_no_kernel_on_a_target_is_said():
    assert lacks(OPS["gelu_backward"], "cpu:avx2") == "the cpu backend has no kernel for it"
    assert lacks(OPS["sample"], "fused") == "its declaration names no fused="
    assert "fused" in targets_of(OPS["gelu_backward"]) and "fused" not in targets_of(OPS["sample"])
