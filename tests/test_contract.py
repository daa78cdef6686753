"""``checks_of`` a user's op. For each promise there is a kernel or a derivative that breaks it, and is found."""

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpt2fast import backends, op
from gpt2fast.op import OPS
from gpt2fast.testing import PROMISES, checks_of

ROOT = Path(__file__).parent.parent
SMALL, ODD, LARGE = dict(B=2, T=3, C=5), dict(B=3, T=2, C=4), dict(B=2, T=160, C=8)


def broken(declared) -> dict[str, str]:
    """The text of the first check that fails, by promise."""
    found: dict[str, str] = {}
    for check in checks_of(declared):
        try:
            check()
        except AssertionError as error:
            found.setdefault(check.promise, str(error))
    return found


@pytest.mark.parametrize("name", ("half", "scaled"))
def test_a_right_op_keeps_every_promise(name, request):
    declared = request.getfixturevalue(name)
    checks = checks_of(declared.key)
    assert broken(declared) == {}
    absent = {"finite_differences", "gradients", "second_derivatives"} if name == "half" else {"no_derivative"}
    assert {check.promise for check in checks} == set(PROMISES) - absent
    assert len({str(check) for check in checks}) == len(checks)
    assert all(str(check).startswith(f"{name}-{check.promise}") for check in checks)


def wrong_values(x):
    y = x * 0.5
    y[..., 1] += 0.25
    return y


def past_the_end(x):
    y = x * 0.5
    if y.nbytes == 60:  # the allocator rounds this up, so that no tensor owns the byte
        ctypes.memset(y.data_ptr() + y.nbytes, 0, 1)
    return y


def beside_its_rows(x):
    if x.dim() == 3 and x.stride(1) > x.shape[2]:
        x.as_strided((1,), (1,), x.storage_offset() + x.shape[2]).zero_()
    return x * 0.5


def transposed(shape):
    return lambda x: (x * 0.5).mT.contiguous().mT if tuple(x.shape) == shape else x * 0.5


CASE = r"\{'B': 2, 'T': 3, 'C': 5\}"


@pytest.mark.parametrize(
    "promise, kernel, said",
    [
        ("parity", wrong_values, r"half .* y: breaks the parity rule .*worst at .*: got .*, truth .*, plain PyTorch "),
        ("opcheck", transposed((3, 2, 4)), r"gpt2fast_test::half: passes_opcheck: OpCheckError: .*Stride mismatch"),
        ("compile", transposed((2, 160, 8)), "gpt2fast_test::half: compiles_whole: expected .*stride 1==8"),
        ("threads", lambda x: x * (0.5 if torch.get_num_threads() == 1 else 0.5000001),
         r"gpt2fast_test::half: y of torch.float32 on one thread after two for .*: \d+ of \d+ elements differ, "
         r"worst at \(\d+, \d+, \d+\): got [\d.e-]+, expected "),
        ("buffers", past_the_end,
         rf"gpt2fast_test::half: the CPU kernel for \w+ writes outside its buffers for {CASE} in torch.bfloat16"),
        ("same_inputs", beside_its_rows,
         f"gpt2fast_test::half: input x after the op in torch.float32 for {CASE}, not named in mutates=: memory "
         "between its rows is changed"),
    ],
)  # fmt: skip
def test_a_wrong_kernel_breaks_that_promise_alone(half, monkeypatch, two_threads, promise, kernel, said):
    monkeypatch.setattr(half, "cases", [LARGE, SMALL, ODD] if promise in ("compile", "opcheck") else [SMALL, ODD])
    torch.set_num_threads(1)
    half.body = kernel
    found = broken(half)
    assert list(found) == [promise]
    assert re.match(said, found[promise], re.S), found[promise]


def overridden(key, kernel):
    """A library that replaces the kernel that ``@op`` registered for ``half``."""
    library = torch.library.Library("gpt2fast_test", "IMPL")
    library.impl("half", kernel, key)
    return library


@pytest.mark.filterwarnings("ignore:.*Overriding a previously registered kernel")
def test_an_autocast_rule_that_is_not_the_declared_one(half):
    exclude = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def lower(x):
        with torch._C._ExcludeDispatchKeyGuard(exclude):
            return half.overload(x.bfloat16())

    library = overridden("AutocastCPU", lower)
    try:
        found = broken(half)
    finally:
        library._destroy()
    assert list(found) == ["autocast"]
    said = f"gpt2fast_test::half: y of torch.float32 under autocast for {CASE}: dtype torch.bfloat16, expected "
    assert re.match(said + "torch.float32", found["autocast"])


@pytest.mark.filterwarnings("ignore:.*Overriding a previously registered kernel")
def test_an_op_without_a_derivative_whose_backward_pass_does_not_raise(half):
    half.body = torch.no_grad()(lambda x: x * 0.5)
    library = overridden("Autograd", torch.library.fallthrough_kernel)
    try:
        found = broken(half)
    finally:
        library._destroy()
    assert list(found) == ["no_derivative"]
    said = "gpt2fast_test::half: a backward pass must raise 'gpt2fast_test::half has no derivative', got 'element 0 of "
    assert found["no_derivative"].startswith(said)


def test_a_kernel_that_gives_other_bits_each_time(half):
    calls = []

    def restless(x):
        calls.append(x)
        return x * (0.5 + len(calls) % 2 * 1e-7)

    half.body = restless
    (*_, check) = checks_of(half, "repeats")
    with pytest.raises(AssertionError, match=r"half: y of a second call for .*elements differ, worst at .*got .*, exp"):
        check()
    assert set(broken(half)) >= {"repeats"}


def input_itself(x):
    return x


def view_of_input(x):
    return x.view(x.shape)


def two_of_one(x):
    both = torch.stack([x, x])
    return both[0], both[1]


@pytest.mark.parametrize(
    "reference, kernel, said",
    [
        (
            torch.clone,
            input_itself,
            f"output y of the op in torch.float32 for {CASE} is input x; it must be a new tensor",
        ),
        (
            torch.clone,
            view_of_input,
            f"output y of the op in torch.float32 for {CASE} shares the memory of input x; it",
        ),
        (input_itself, torch.clone, f"output y of the reference in torch.float32 for {CASE} is input x; it must be a "),
        (
            two_of_one,
            None,
            f"output z of the op in torch.float32 for {CASE} shares the memory of output y; it must be a ",
        ),
    ],
    ids=("input", "view", "reference", "outputs"),
)
def test_an_output_that_is_no_new_tensor(reference, kernel, said, request):
    name, two = f"same_{request.node.callspec.id}", reference is two_of_one

    def same(x: Tensor) -> Tensor:
        """y = x."""
        return reference(x)

    same.__name__ = name
    if two:
        same.__annotations__["return"] = tuple[Tensor, Tensor]
    returns = "y z" if two else "y"
    declared = op(shapes=dict(x="... C"), cases=[SMALL], returns=returns, derivative=False, namespace="gpt2fast_test")(
        same
    )
    library = torch.library.Library("gpt2fast_test", "IMPL")
    if kernel is not None:
        library.impl(name, lambda x: (declared.check_call(x), kernel(x))[1], "CPU")
    try:
        found = broken(declared)
    finally:
        library._destroy()
        del OPS[declared.key]
    # torch's own checks see some of these: opcheck always does; torch.compile warns, and it refuses if CI is set.
    assert set(found) <= {"new_outputs", "opcheck", "compile"}
    assert re.match(f"gpt2fast_test::{name}: {said}", found["new_outputs"])


def right(saved, grad):
    return dict(x=(grad.y * saved.weight).contiguous(), weight=(grad.y * saved.x).flatten(0, -2).sum(0))


def wrong_where(wrong):
    """The derivative by the weight. It is twice as large as it should be if ``wrong`` is set."""

    def derivative(saved, grad):
        found = right(saved, grad)
        return found | dict(weight=found["weight"] * (2 if wrong(saved) else 1))

    return derivative


def constant_if_differentiated(saved, grad):
    found = right(saved, grad)
    return {n: t.detach() for n, t in found.items()} if torch.is_grad_enabled() else found


@pytest.mark.parametrize(
    "promise, derivative, said",
    [
        ("finite_differences", wrong_where(lambda s: s.x.dtype == torch.float64 and backends.active() == "auto"),
         rf"gpt2fast_test::scaled: gradients for {CASE} \(input 0 is x, input 1 is weight\): Jacobian mismatch for "
         "output 0 with respect to input 1"),
        ("gradients", wrong_where(lambda s: s.x.dtype == torch.bfloat16 and backends.active() == "fused"),
         rf"gpt2fast_test::scaled: dweight on 'fused' for {CASE} in torch.bfloat16: breaks the parity rule .*got "),
        ("second_derivatives", constant_if_differentiated,
         rf"gpt2fast_test::scaled: the gradients for {CASE} are constants to autograd, "),
    ],
)  # fmt: skip
def test_a_wrong_derivative_breaks_that_promise_alone(scaled, promise, derivative, said):
    scaled.derivative = derivative
    found = broken(scaled)
    assert list(found) == [promise]
    assert re.match(said, found[promise], re.S), found[promise]


def test_an_input_that_is_changed(half):
    half.body = lambda x: x.mul_(0.5).clone()
    (check, *_) = checks_of(half, "same_inputs")
    said = rf"gpt2fast_test::half: input x after the op in torch.float32 for {CASE}, not named in mutates=: 30 of 30 "
    with pytest.raises(AssertionError, match=said + r"elements differ, worst at .*: got [\d.-]+, expected [\d.-]+"):
        check()


def test_a_kernel_that_does_not_look_at_its_arguments(half, monkeypatch):
    monkeypatch.setattr(half, "check_call", lambda x: None)
    half.body = lambda x: x * 0.5
    found = broken(half)
    assert list(found) == ["bad_input"]
    said = "gpt2fast_test::half: x with another kind: the op must raise TypeError 'gpt2fast_test::half: x must be a "
    assert found["bad_input"].startswith(said) and "must call the op's check_call first" in found["bad_input"]


def test_a_list_of_checks_computes_nothing(scaled, monkeypatch):
    def refuse(shape, case, generator):
        raise RuntimeError("this makes an input")

    monkeypatch.setattr(scaled, "make", dict(x=refuse))
    checks = checks_of(scaled)
    assert len(checks) > 40
    with pytest.raises((AssertionError, RuntimeError), match="this makes an input"):
        checks[-1]()


def test_large_cases_alone_leave_no_promise_out(half, scaled, monkeypatch):
    for declared in (half, scaled):
        before = {check.promise for check in checks_of(declared)}
        monkeypatch.setattr(declared, "cases", [dict(B=1, T=64, C=3072), dict(B=0, T=3, C=3072)])
        assert {check.promise for check in checks_of(declared)} == before
    (large, *_) = checks_of(scaled, "finite_differences")
    large()
    scaled.derivative = wrong_where(lambda s: True)
    with pytest.raises(
        AssertionError, match=r"scaled: gradients for .*: dweight is not what finite differences .*got [\d.]+, expe"
    ):
        large()


def test_what_checks_of_refuses(half, monkeypatch):
    with pytest.raises(ValueError, match=r"op must be one of adamw_, .*, got 'mine::nothing'"):
        checks_of("mine::nothing")
    with pytest.raises(ValueError, match=r"promise must be one of parity, opcheck, .*, got 'speed'"):
        checks_of(half, "speed")
    monkeypatch.setattr(half, "cases", [dict(B=0, T=3, C=5)])
    with pytest.raises(ValueError, match=r"half: cases= must name at least one case that has elements, got \[\{'B': 0"):
        checks_of(half)
    assert checks_of("gpt2fast::gelu", "compile")[0].op is checks_of("gelu", "compile")[0].op is OPS["gelu"]


PACKAGE = '''
import torch
from torch import Tensor
from gpt2fast import op

@op(shapes=dict(x="... C"), cases=[dict(B=2, T=3, C=5)], namespace="mine")
def scale(x: Tensor, factor: float = 2.0) -> Tensor:
    """y = factor x."""
    return x * factor

@scale.backward()
def _(saved, grad):
    return dict(x=grad.y * (saved.factor + WRONG))
'''
TESTS = """
import my_package
import pytest
from gpt2fast.testing import checks_of

@pytest.mark.parametrize("check", checks_of("mine::scale"), ids=str)
def test_op(check): check()
"""


@pytest.mark.parametrize("wrong", ("0", "0.5"))
def test_the_whole_test_file_of_a_package(tmp_path, wrong):
    (tmp_path / "my_package.py").write_text(PACKAGE.replace("WRONG", wrong))
    (tmp_path / "test_mine.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", "test_mine.py"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    count = len(re.findall(r"^FAILED test_mine.py::test_op\[scale-", done.stdout, re.M))
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= 20 and done.returncode == int(count > 0), done.stdout
    found = set(re.findall(r"test_op\[scale-(\w+)", done.stdout))
    assert found == ({"finite_differences", "second_derivatives"} if wrong != "0" else set()), done.stdout
