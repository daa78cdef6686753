"""Where kernels come from: modules and functions named for an op, a user's backends, and the errors in them."""

import inspect
import re
import sys

import pytest
import torch
from torch import Tensor

import gpt2fast
from gpt2fast import backends, cli
from gpt2fast.backends import BACKENDS, Backend, Kernels, choose, register, unregister, use_backend
from gpt2fast.op import OPS
from gpt2fast.testing import check_op, lacks, on, targets, targets_of

X = torch.randn(2, 3, 8)


@pytest.fixture(scope="module")
def third():
    """An op in another namespace, without a kernel."""

    @gpt2fast.op(
        shapes=dict(x="... C"), cases=[dict(B=2, T=3, C=8), dict(B=0, T=3, C=5)], derivative=False,
        namespace="gpt2fast_sources",
    )  # fmt: skip
    def third(x: Tensor) -> Tensor:
        """y = x / 3."""
        return x / 3

    yield third
    del OPS[third.key]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a kernel module and returns its name. Afterwards, what was set for the GPU backends is undone."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("triton", "cuda"):
        kernels = Kernels(f"gpt2fast.{'kernels' if name == 'triton' else 'cuda'}")
        mine = Backend(name, BACKENDS[name].devices, lambda: None, kernels)
        monkeypatch.setitem(BACKENDS, name, mine)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


def numpy_third(scale=1 / 3):
    def run(x):
        return torch.from_numpy(x.float().numpy() * scale).to(x.dtype).contiguous()

    return run


@pytest.fixture
def mine(third):
    """A user's own backend in numpy, with a kernel of ``third``."""
    with register(Backend("mine", ("cpu",), lambda: None, what="numpy")) as backend:
        third.kernel("mine", numpy_third(), lambda x: None if x.dtype != torch.float64 else "no float64")
        yield backend


def test_a_module_is_imported_when_its_kernel_is_wanted(third, module):
    name = module("kernels_of_third", f"""if True:
        def third(x):
            return x / 3
        KERNELS = {{{third.key!r}: (third, lambda x: None if x.is_contiguous() else "gaps")}}
    """)  # fmt: skip
    assert third.kernels("triton", name) is third
    assert name not in sys.modules and lacks(third, "triton:ptx") is None
    assert lacks(third, "cuda:ptx") == "the cuda backend has no kernel for it"
    choice = choose(third, X, device="cuda")
    assert choice.backend == "triton" and choice.run is sys.modules[name].third
    assert choose(third, X.transpose(0, 2), device="cuda").objections["triton"] == "gaps"
    third.kernels("cuda", name)
    assert choose(third, X, device="cuda").backend == "triton"  # the first of both


def test_a_kernel_said_for_an_op_of_ours_takes_the_place_of_ours(module):
    gelu = OPS["gelu"]
    ours = choose(gelu, X, device="cuda").run
    name = module("another_gelu", """if True:
        def gelu(x, approximate="tanh"):
            return x
        KERNELS = dict(gelu=(gelu, lambda x, approximate="tanh": None))
    """)  # fmt: skip
    kernels = BACKENDS["triton"].kernels
    before = len(kernels)
    gelu.kernels("triton", name)
    assert choose(gelu, X, device="cuda").run is sys.modules[name].gelu is not ours and len(kernels) == before
    gelu.kernel("triton", lambda x, approximate="tanh": x, lambda x, approximate="tanh": "never")
    assert choose(gelu, X, device="cuda").objections["triton"] == "never" and len(kernels) == before
    gelu.kernels("triton", "gpt2fast.kernels.gelu")
    assert choose(gelu, X, device="cuda").run is ours and list(kernels).count("gelu") == 1


@pytest.mark.parametrize(
    "text, error, said",
    (
        (None, ImportError, "there is no module 'wrong', where kernels(backend, 'wrong') says that its kernel is;"),
        ("import gpt2fast_is_not_this", ImportError,
         "gpt2fast_sources::third: its kernel module 'wrong' does not import: No module named 'gpt2fast_is_not_this'"),
        ("", TypeError, "must have a dict KERNELS = {'gpt2fast_sources::third': (run, supports)}, got none"),
        ("KERNELS = {'third': 1}", TypeError, "the op's name 'gpt2fast_sources::third' as a key, got 'third'"),
        ("KERNELS = {'gpt2fast_sources::third': print}", TypeError, "be (run, supports) or (run, supports, slower)"),
        ("KERNELS = {'gpt2fast_sources::third': (lambda y: y, lambda x: None)}", TypeError,
         "gpt2fast_sources::third: run of backend 'triton' must take the op's arguments (x), got (y)"),
    ),
)  # fmt: skip
def test_a_module_without_the_kernel_is_named_with_the_fix(text, error, said, third, module):
    if text is not None:
        module("wrong", text)
    third.kernels("triton", "wrong")
    with pytest.raises(error, match=re.escape(said)):
        choose(third, X, device="cuda")


def test_the_check_names_a_module_that_is_missing_and_goes_on(third, module, monkeypatch):
    pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")
    third.kernels("triton", "gpt2fast_no_such_module")
    monkeypatch.setattr("gpt2fast.testing.check.targets_of", lambda op: ["triton:ptx", "reference"])
    rows = check_op(third)
    found = {
        target: {row["error"] for row in rows if row["target"] == target} for target in ("triton:ptx", "reference")
    }
    (error,) = found["triton:ptx"]
    assert "third: there is no module 'gpt2fast_no_such_module'" in error and found["reference"] == {None}


@pytest.fixture
def ours_alone(monkeypatch):
    """Takes away the CUDA kernels that tests of other packages' ops have left in this process."""
    for key in [key for key in BACKENDS["cuda"].kernels if "::" in key]:
        monkeypatch.delitem(BACKENDS["cuda"].kernels, key)


def test_cuda_kernels_of_a_package_run_where_ours_are_not_built(ours_alone, third, monkeypatch):
    pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")
    from gpt2fast.cuda import library
    from gpt2fast.testing import ptx

    monkeypatch.setitem(vars(library.OURS), "_machine_reason", "ours are not built")
    with ptx.machine():
        assert backends.status()["cuda"] == "ours are not built"
        third.kernel("cuda", lambda x: x / 3, lambda x: None)
        try:
            assert backends.status()["cuda"] is None
            with use_backend("cuda"):
                assert choose(third, X).backend == "cuda"
                with pytest.raises(RuntimeError, match="backend 'cuda' does not cover this call: ours are not built"):
                    OPS["gelu"](X)
        finally:
            del BACKENDS["cuda"].kernels[third.key]
        assert backends.status()["cuda"] == "ours are not built" and third.key not in BACKENDS["cuda"].kernels


def test_on_a_gpu_too(ours_alone, third, monkeypatch):
    from gpt2fast.cuda import library

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(vars(library.OURS), "library_reason", "ours are not built")
    assert "cuda:gpu" not in targets()
    third.kernel("cuda", lambda x: x / 3, lambda x: None)
    try:
        assert "cuda:gpu" in targets() and lacks(third, "cuda:gpu") is None
        assert lacks(OPS["gelu"], "cuda:gpu") == "ours are not built" and lacks(OPS["gelu"], "cuda:ptx") is None
    finally:
        del BACKENDS["cuda"].kernels[third.key]
    assert "cuda:gpu" not in targets()


def test_a_backend_for_gpus_is_a_target_where_there_is_one():
    with register(Backend("mine", ("cuda",), lambda: None)):
        assert ("mine:gpu" in targets()) == torch.cuda.is_available() and "mine" not in targets()


def test_what_is_no_module_no_function_and_no_backend_is_refused(third, module):
    with pytest.raises(ValueError, match=r"backend must be one of cpu, triton, cuda, got 'cudnn'; .*register"):
        third.kernels("cudnn", "somewhere")
    with pytest.raises(ValueError, match=r"module must be its full name, 'my_package.kernels', got 'a/b.py'"):
        third.kernels("triton", "a/b.py")
    with pytest.raises(ValueError, match="registered with torch's dispatcher. For functions in Python register a"):
        third.kernel("cpu", lambda x: x, lambda x: None)
    with pytest.raises(TypeError, match=r"supports of backend 'cuda' must take the op's arguments \(x\), got \(\)"):
        third.kernel("cuda", lambda x: x, lambda: None)
    with pytest.raises(
        TypeError, match="gelu: supports of backend 'cuda' must have the op's default approximate='tanh'"
    ):
        OPS["gelu"].kernel("cuda", lambda x, approximate="tanh": x, lambda x, approximate: None)
    with pytest.raises(TypeError, match="third: run of backend 'cuda' must be a function, got 3"):
        third.kernel("cuda", 3, lambda x: None)
    assert third.key not in BACKENDS["cuda"].kernels


def test_a_backend_of_ones_own_runs_is_a_target_and_is_checked(third, mine):
    assert choose(third, X).backend == "mine"
    assert torch.equal(third(X), torch.from_numpy(X.numpy() * (1 / 3)))
    assert choose(third, X.double()).objections["mine"] == "no float64"
    assert "mine" in targets() and "mine" in targets_of(third)
    assert lacks(OPS["gelu"], "mine") == "the mine backend has no kernel for it"
    rows = [row for row in check_op(third) if row["target"] == "mine"]
    assert len(rows) >= 6 and not [row["error"] for row in rows if row["error"]]
    with on("mine") as device, pytest.raises(RuntimeError, match="backend 'mine' does not cover this call"):
        assert device == "cpu"
        OPS["gelu"](X)


def test_a_kernel_is_held_against_its_op_again_where_that_is_declared_anew(third, mine, monkeypatch):
    assert choose(third, X).backend == "mine"
    monkeypatch.setattr(third, "signature", inspect.signature(lambda x, scale: None))
    with pytest.raises(TypeError, match=r"run of backend 'mine' must take the op's arguments \(x, scale\), got \(x\)"):
        choose(third, X)


def test_the_check_finds_what_a_backend_of_ones_own_does_wrong(third, mine):
    third.kernel("mine", numpy_third(0.334), lambda x: None)
    wrong = [row for row in check_op(third) if row["error"]]
    assert {row["target"] for row in wrong} == {"mine"} and "case" in wrong[0]


def test_a_backend_that_cannot_run_says_why_and_is_no_target(third, capsys):
    with register(Backend("mine", ("cpu",), lambda: "numba is not installed; pip install numba")):
        third.kernel("mine", numpy_third(), lambda x: None)
        assert "mine" not in targets() and backends.status()["mine"] == "numba is not installed; pip install numba"
        assert choose(third, X).objections["mine"] == "numba is not installed; pip install numba"
        with pytest.raises(RuntimeError, match="backend 'mine' cannot be used: numba is not installed"):
            use_backend("mine")
        assert cli.main(["info"]) == 0
        assert re.search("mine +numba is not installed; pip install numba", capsys.readouterr().out)
    assert "mine" not in backends.status()


@pytest.mark.parametrize(
    "backend, error, said",
    (
        (lambda: "mine", TypeError, "must be given a gpt2fast.backends.Backend, got 'mine'"),
        (lambda: Backend("triton", ("cuda",), lambda: None), ValueError, "there is a backend 'triton' already"),
        (lambda: Backend("fused", ("cpu",), lambda: None), ValueError, "there is a backend 'fused' already"),
        (lambda: Backend("a:b", ("cpu",), lambda: None), ValueError, "must be letters, digits and _, got 'a:b'"),
        (lambda: Backend("mine", "cpu", lambda: None), ValueError, "must be like ('cpu',), got 'cpu'"),
        (lambda: Backend("mine", ("gpu",), lambda: None), ValueError, "must be types of torch devices, got 'gpu'"),
    ),
)
def test_what_is_no_backend_is_refused(backend, error, said):
    with pytest.raises(error, match=re.escape(said)):
        register(backend())
    assert "mine" not in BACKENDS


def test_only_ones_own_backend_is_taken_away_and_not_while_it_is_in_force():
    register(Backend("mine", ("cpu",), lambda: None, {}))
    with pytest.raises(ValueError, match=r"takes a backend of your own \(mine\), got 'triton'"):
        unregister("triton")
    with use_backend("mine"), pytest.raises(RuntimeError, match="'mine' is in force"):
        unregister("mine")
    unregister("mine")
    with pytest.raises(ValueError, match=r"takes a backend of your own \(none now\), got 'mine'"):
        unregister("mine")
