"""The fused head and loss on the PTX machine, in Triton and in CUDA C++: chunks of rows, ends of the vocabulary, large
logits, ignored rows."""

import sys

import pytest
import torch
from both import kernels_of
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast import backends, head_and_loss
from gpt2fast.op import OPS
from gpt2fast.ops.common import multiply
from gpt2fast.testing import assert_close_to_truth
from gpt2fast.testing.inputs import build, reference, truth

ALL = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = pytest.mark.parametrize("dtype", ALL, ids=("float32", "bfloat16", "float16"))
NAME = "linear_cross_entropy"
kernels = kernels_of(NAME)


@pytest.fixture
def run(kernels, monkeypatch):
    """The kernels' outputs and launches, with the backend's own products or with those that ``auto`` chooses."""

    def call(name, args, products="own"):
        monkeypatch.setattr(backends, "active", lambda: kernels.backend if products == "own" else products)
        return kernels(name, args)

    return call


def check(run, name, args, products="own"):
    found, launches = run(name, args, products)
    for what, ours, plain, exact in zip(OPS[name].outputs, found, *(f(OPS[name], args) for f in (reference, truth))):
        assert_close_to_truth(ours, plain, exact, what)
    return launches


@pytest.fixture
def few_rows(monkeypatch):
    """Makes chunks at most 20 rows long. With fewer than ten rows, PyTorch's product on a CPU has other errors."""
    for name in ("MOST_ROWS", "FEW_ROWS"):
        monkeypatch.setattr(sys.modules["gpt2fast.ops.linear_cross_entropy"], name, 20)


@DTYPES
@pytest.mark.parametrize("products", ("own", "auto"))
@pytest.mark.parametrize("V", (1, 64, 4095, 4097))
def test_chunks_and_ends_of_the_vocabulary(run, V, products, dtype, few_rows):
    args = build(OPS[NAME], dict(R=50, K=24, V=V, keep="both", ignore_index=0), dtype)
    launches = check(run, NAME, args, products)
    assert sum("loss_and_gradient_kernel" in launch.name for launch in launches) == 3
    backward = build(OPS[f"{NAME}_backward"], dict(R=50, K=24, V=V, reduction="none"), dtype)
    check(run, f"{NAME}_backward", backward, products)


@DTYPES
def test_chunks_change_what_is_added_up_and_nothing_else(run, dtype, few_rows, monkeypatch):
    args = build(OPS[NAME], dict(R=50, K=24, V=70, keep="both"), dtype)
    (loss, lse, dx, dweight), _ = run(NAME, args)
    monkeypatch.undo()
    whole, _ = run(NAME, args)
    assert torch.equal(loss, whole[0]) and torch.equal(lse, whole[1]) and torch.equal(dx, whole[2])
    assert_close_to_truth(dweight, *(f(OPS[NAME], args)[3] for f in (reference, truth)))


def test_large_logits_keep_the_digits_of_their_differences(run):
    """A column of x adds 2^22 to every logit of a row. The loss and its gradients have the same bits as without it."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.zeros(5, 3), torch.zeros(300, 3)
    x[:, 0], weight[:, 0] = 1.0, torch.randn(300, generator=g).round()
    args = dict(x=x, weight=weight, targets=torch.arange(5), keep="dx", reduction="sum")
    (near, _, dnear, _), _ = run(NAME, args)
    weight[:, 1], x[:, 1] = 1.0, 2.0**22
    (far, _, dfar, _), _ = run(NAME, args)
    assert torch.equal(near, far) and torch.equal(dnear[:, 0], dfar[:, 0])


def test_a_target_outside_the_vocabulary_is_no_number(run):
    x, weight = torch.zeros(3, 8), torch.zeros(5, 8)
    (loss, *_), _ = run(NAME, dict(x=x, weight=weight, targets=torch.tensor([4, 5, -1]), reduction="none"))
    assert loss.isnan().tolist() == [False, True, True]


@DTYPES
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@pytest.mark.parametrize("ignore_index", (-100, 3, 2**40))
def test_ignored_rows(run, ignore_index, reduction, dtype):
    """Ignored rows have loss and gradients 0, also with smoothing, for all lengths of a row's last pack."""
    for V in (33, 40, 46):
        case = dict(R=30, K=24, V=V, reduction=reduction, ignore_index=ignore_index, label_smoothing=0.2)
        check(run, NAME, build(OPS[NAME], case | dict(keep="both"), dtype))
        args = build(OPS[f"{NAME}_backward"], case, dtype)
        check(run, f"{NAME}_backward", args)
        (dx, _), _ = run(f"{NAME}_backward", args)
        ignored = args["targets"] == ignore_index
        assert ignored.any() and not dx[ignored].any()


def test_logits_of_minus_infinity(run):
    """Only -infinity in the first part of a row, and in all columns but one."""
    x, weight = torch.eye(2), torch.randn(300, 2, generator=torch.Generator().manual_seed(2))
    weight[:260, 0] = weight[1:, 1] = -torch.inf
    args = dict(x=x[:, :1], weight=weight[:, :1], targets=torch.tensor([270, 270]), reduction="none")
    args["x"][1] = 1
    (loss, lse, *_), _ = run(NAME, args, "auto")
    for found, at in ((lse, 0.0), (loss, weight[270, 0])):
        plain, exact = (weight[:, 0].to(kind).logsumexp(0) - at for kind in (torch.float32, torch.float64))
        assert_close_to_truth(found, plain.expand(2), exact.expand(2))


def test_strides(run):
    g = torch.Generator().manual_seed(4)
    x, weight = torch.randn(24, 2, 40, generator=g)[:, 1], torch.randn(40, 75, generator=g).t()
    targets = torch.randint(0, 75, (48,), generator=g)[::2]
    args = dict(x=x, weight=weight, targets=targets, reduction="none", label_smoothing=0.1)
    check(run, NAME, args)
    (_, lse, *_), _ = run(NAME, args)
    dloss, apart = torch.randn(48, generator=g)[::2], torch.stack((lse, lse), 1)[:, 1]
    for given in (dloss, torch.ones(()).expand(24)):
        check(run, f"{NAME}_backward", args | dict(dloss=given, lse=apart))


class Calls(TorchDispatchMode):
    """Collects the names of the PyTorch functions that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_pytorch_only_multiplies():
    """Between our kernels, PyTorch fills nothing, copies nothing and adds nothing up."""
    args = build(OPS[NAME], dict(R=6, K=24, V=64, keep="both"))
    with Calls() as calls:
        head_and_loss.linear_cross_entropy(multiply, lambda *given: None, lambda loss, *given: loss, **args)
    assert [name for name in calls.names if name not in ("empty_like", "new_empty", "t")] == ["mm"] * 3
