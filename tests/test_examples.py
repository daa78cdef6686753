"""The packages in tests/examples, each written as a user would write it: their own ops, kernels and a backend."""

import contextlib
import copy
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt2fast import GPT2, AdamW, Config, backends, build_cuda, cli, ops
from gpt2fast.backends import choose, unregister, use_backend
from gpt2fast.cuda.library import DTYPES, CudaLibrary, machine_reason
from gpt2fast.op import OPS
from gpt2fast.testing import assert_close_to_truth, assert_parity, build, checks_of, on, runs, targets

FOLDER = Path(__file__).parent / "examples"
PTX_TARGETS = [target for target in targets() if target.endswith(":ptx")]
needs_nvcc = pytest.mark.skipif(machine_reason() is not None, reason=str(machine_reason()))


@pytest.fixture(scope="module")
def examples():
    """Imports a package of tests/examples. Its ops are in ``OPS`` for the tests of this file only."""
    sys.path.insert(0, str(FOLDER))
    if torch.cuda.is_available():
        if machine_reason():
            pytest.skip(f"the examples' libraries cannot be built: {machine_reason()}")
        for source in FOLDER.glob("*/*.cu"):
            build_cuda(source.with_name("_cuda.so"), source)
    OPS.update(_ops)
    for name in ("rms_norm", "swiglu") if backends._C is not None else ():
        importlib.import_module(f"{name}.cpu")
    yield importlib.import_module
    sys.path.remove(str(FOLDER))
    for key in [key for key in OPS if key.startswith("examples::")]:
        _ops[key] = OPS.pop(key)


_ops = {}  # ops of packages that were imported before


@pytest.mark.parametrize("name", ("rms_norm", "rms_norm_backward", "swiglu"))
def test_an_op_of_a_package_keeps_every_promise_on_every_target(name, examples):
    op = getattr(examples(name.removesuffix("_backward")), name)
    wanted = PTX_TARGETS + ([] if op.derivative_of else [t for t in targets() if t.startswith("cpu:")])
    assert {run["target"] for run in runs(op)} >= set(wanted or ["reference"])
    broken = []
    for check in checks_of(op):
        try:
            check()
        except AssertionError as error:
            broken.append(f"{check}: {error}")
    assert not broken, "\n".join(broken)


def gradients(op, args, dtype=None):
    """The gradients by input, for one gradient of the output. If ``dtype`` is given, the reference computes in it."""
    values = {n: v.detach().to(dtype or v.dtype).requires_grad_() if torch.is_tensor(v) else v for n, v in args.items()}
    y = op(**values) if dtype is None else op.reference(**values)
    y = y[0] if isinstance(y, tuple) else y
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(args[op.tensors[0]].dtype)
    y.backward(dy.to(y.dtype))
    return {n: values[n].grad for n in op.tensors}


@pytest.mark.parametrize("target", PTX_TARGETS)
@pytest.mark.parametrize("name", ("rms_norm", "swiglu"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_training_keeps_the_parity_rule(name, target, dtype, examples):
    op = getattr(examples(name), name)
    args = build(op, op.cases[0], dtype)
    plain, truth = gradients(op, args, torch.float32), gradients(op, args, torch.float64)
    with on(target):  # an op without a kernel raises there
        found = gradients(op, args)
    for input in op.tensors:
        assert_close_to_truth(found[input], plain[input].to(dtype), truth[input])


def test_a_package_with_kernels_needs_neither_triton_nor_nvcc(tmp_path):
    code = """if True:
        import sys, torch, rms_norm, swiglu
        x = torch.randn(2, 3, 8, requires_grad=True)
        swiglu.swiglu(rms_norm.rms_norm(x, torch.ones(8)), x).sum().backward()
        assert x.grad.isfinite().all()
        assert not [n for n in sys.modules if n.split(".")[0] == "triton" or n.endswith("_kernels")]
        print("done")
    """
    environment = os.environ | {"PYTHONPATH": str(FOLDER), "PATH": str(tmp_path), "CUDA_HOME": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


def test_the_command_line_checks_and_shows_it(examples, capsys):
    examples("swiglu")
    assert cli.main(["check", "examples::swiglu", "--json"]) == 0
    (rows,) = json.loads(capsys.readouterr().out).values()
    assert {row["target"] for row in rows if "case" in row} >= set(PTX_TARGETS or ["reference"])
    assert cli.main(["info"]) == 0 and "examples::swiglu" in capsys.readouterr().out


def decoder(examples, layers=2):
    """A GPT-2 over bytes, with the blocks of the example."""
    torch.manual_seed(0)
    config = Config(n_layer=layers, n_head=2, n_embd=32, n_positions=64, vocab_size=256)
    return GPT2(config, block=examples("decoder_block").Block).eval()


def texts(rows, columns):
    """Rows of bytes from Python's own library."""
    data = torch.frombuffer(bytearray(Path(json.decoder.__file__).read_bytes()), dtype=torch.uint8).long()
    starts = torch.randint(len(data) - columns, (rows,), generator=torch.Generator().manual_seed(1))
    return torch.stack([data[start : start + columns] for start in starts])


@pytest.mark.parametrize("target", ["auto", *PTX_TARGETS])
def test_gradients_of_gpt2_with_a_block_of_ones_own(examples, target):
    model = decoder(examples, layers=1)
    rows = texts(2, 20)

    def gradients(model):
        model.zero_grad()
        model(rows[:, :-1], targets=rows[:, 1:]).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    with on(target) if target != "auto" else contextlib.nullcontext():
        found = gradients(model)
    with use_backend("reference"):
        plain, truth = gradients(model), gradients(copy.deepcopy(model).double())
    for name in found:
        assert_close_to_truth(found[name], plain[name], truth[name], name)


def test_gpt2_with_a_block_of_ones_own_learns_and_generates(examples):
    model = decoder(examples)
    rows = texts(256, 33)
    optimizer = AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(100):
        batch = rows[step * 16 % 256 :][:16]
        loss = model(batch[:, :-1], targets=batch[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shares = torch.bincount(rows.flatten(), minlength=256) / rows.numel()
    assert loss.item() < torch.special.entr(shares).sum()  # the loss of predicting each byte by its frequency
    prompt, expected = rows[:2, :9], rows[:2, :9]
    with use_backend("reference"), torch.no_grad():
        for _ in range(12):  # without a cache
            expected = torch.cat((expected, model(expected)[:, -1:].argmax(-1)), 1)
    assert torch.equal(model.generate(prompt, max_new_tokens=12), expected)


@needs_nvcc
def test_its_library_is_built_loads_without_a_gpu_and_is_not_built_again(examples, tmp_path, monkeypatch):
    examples("rms_norm")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    source = FOLDER / "rms_norm" / "rms_norm.cu"
    path = build_cuda(tmp_path / "made" / "_cuda.so", source, FOLDER / "swiglu" / "swiglu.cu")
    built = path.stat().st_mtime_ns
    assert build_cuda(path, source, FOLDER / "swiglu" / "swiglu.cu") == path and path.stat().st_mtime_ns == built
    library = CudaLibrary(path, source.parent)
    assert library.library_reason is None
    if torch.cuda.is_available():
        return
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: None, raising=False)
    x, rstd = torch.zeros(4, 8), torch.zeros(4)
    with pytest.raises(RuntimeError, match="examples_rms_norm: CUDA error 1: invalid argument"):
        library.call(source.name, "examples_rms_norm", x, x[0], x, rstd, 2**31, 8, 8, 1e-6, DTYPES[x.dtype])
    with pytest.raises(RuntimeError, match=r"examples_rms_norm: CUDA error \d+: .*driver"):
        library.call(source.name, "examples_rms_norm", x, x[0], x, rstd, 4, 8, 8, 1e-6, DTYPES[x.dtype])


@needs_nvcc
def test_what_does_not_compile_is_said_in_nvccs_words(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    with pytest.raises(ValueError, match="gpt2fast.build_cuda: sources must be at least one .cu file, got none"):
        build_cuda(tmp_path / "_cuda.so")
    with pytest.raises(FileNotFoundError, match="sources must be files, got .*missing.cu, which is not there"):
        build_cuda(tmp_path / "_cuda.so", tmp_path / "missing.cu")
    source = tmp_path / "wrong.cu"
    source.write_text('#include "cuda/device.cuh"\n__global__ void kernel(float* y) { y[0] = gone; }\n')
    with pytest.raises(RuntimeError, match=r"(?s)nvcc failed:.*wrong.cu\(2\).*identifier \"gone\" is undefined"):
        build_cuda(tmp_path / "_cuda.so", source)
    library = CudaLibrary(tmp_path / "_cuda.so", tmp_path)
    assert not library.path.exists() and "is not built; gpt2fast.build_cuda(" in library.library_reason
    from gpt2fast.testing import ptx

    with ptx.machine(), pytest.raises(RuntimeError, match='identifier "gone" is undefined'):
        library.call("wrong.cu", "kernel", torch.zeros(1))


def test_without_nvcc_it_says_what_to_install(tmp_path, monkeypatch):
    from gpt2fast.cuda import build as module

    monkeypatch.setitem(module._tools()["build"].__globals__, "find_nvcc", lambda: None)
    source = tmp_path / "some.cu"
    source.write_text("\n")
    with pytest.raises(RuntimeError, match="install NVIDIA's CUDA toolkit, or set CUDA_HOME to its folder"):
        build_cuda(tmp_path / "_cuda.so", source)


@pytest.fixture
def numba_backend(examples):
    pytest.importorskip("numba", reason="numba is not installed")
    sys.modules.pop("layer_norm_numba", None)  # its import registers it
    yield examples("layer_norm_numba")
    unregister("numba")


def test_a_backend_in_numba_keeps_the_parity_rule(numba_backend):
    op = OPS["layer_norm"]
    found = [run for run in runs(op) if run["target"] == "numba"]
    assert {run["dtype"] for run in found} == set(op.dtypes)
    with on("numba"):
        for run in found:
            assert_parity(op, run["case"], run["dtype"], run["layout"])


def test_a_backend_in_numba_is_asked_where_ours_do_not_run_and_alone_by_its_name(numba_backend):
    x, weight = torch.randn(3, 8), torch.ones(8)
    assert choose(OPS["layer_norm"], x, weight, weight).backend == "cpu" and backends.status()["numba"] is None
    with use_backend("numba"):
        assert choose(OPS["layer_norm"], x, weight, weight).run is numba_backend.layer_norm
        y = ops.layer_norm(x.requires_grad_(), weight, weight)
        assert torch.equal(y, numba_backend.layer_norm(x, weight, weight)[0])
        with pytest.raises(RuntimeError, match="backend 'numba' does not cover this call: .*, got float64"):
            ops.layer_norm(x.double(), weight.double(), weight.double())
        with pytest.raises(RuntimeError, match="layer_norm_backward: backend 'numba' does not cover this call"):
            y.sum().backward()
