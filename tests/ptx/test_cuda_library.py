"""The library of the CUDA kernels as it is built for GPUs: its machine code is read, and it loads without a GPU."""

import ctypes
import functools
import re
import runpy
import subprocess
from pathlib import Path

import pytest
import torch

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast import disk_cache
from gpt2fast.cuda import MODULES, library
from gpt2fast.testing.ptx import cuda as machine_cuda
from gpt2fast.testing.ptx import load_cuda, toolchain
from gpt2fast.testing.ptx.toolchain import tool, version

ROOT = Path(__file__).parents[2]
BUILD = runpy.run_path(str(ROOT / "csrc/cuda/build.py"))
pytestmark = pytest.mark.skipif(BUILD["find_nvcc"]() is None, reason="nvcc is not there")
STREAMING = (
    "layer_norm_kernel",
    "layer_norm_backward_kernel",
    "gelu_kernel",
    "gelu_backward_kernel",
    "embedding_kernel",
    "embedding_backward_kernel",
)
# Kernels for rows of any alignment, and how a thread keeps four packs in flight. L and S are 128-bit loads and stores.
PEELED = dict(
    cross_entropy_kernel="LLLL", cross_entropy_backward_kernel="LLLLSSSS", loss_and_gradient_kernel="LLLLSSSS"
)

ARCHITECTURES = ("sm_80", "sm_90")
PRODUCTS = ("linear", "linear_backward", "mlp_backward")  # these ops use one kernel, the product of two matrices


@functools.cache
def machine_object(source):
    """The object file of a source that the PTX machine runs: it holds PTX for sm_80. The op tests compile it too."""
    linked = []
    with pytest.MonkeyPatch.context() as patch:
        link = toolchain.link
        patch.setattr(machine_cuda, "link", lambda objects, *others: linked.extend(objects) or link(objects, *others))
        load_cuda(source, flags=library.FLAGS)
    return linked[0]


def code_from_machine_ptx(arch):
    """The disassembly of the PTX machine's own PTX, compiled for an architecture; sm_80 is as build.py has it."""

    def compile(folder):
        command = [tool("cuobjdump"), "-xptx", "all", str(file)]
        subprocess.run(command, cwd=folder, capture_output=True, check=True)
        (ptx,) = folder.glob("*.ptx")
        cubin = folder / "kernels.cubin"
        toolchain.run([tool("nvcc"), "-cubin", f"-arch={arch}", "-lineinfo", "-o", str(cubin), str(ptx)], "nvcc")
        (folder / "kernels.sass").write_text(disassembly(cubin, arch))
        return folder / "kernels.sass", []

    found = ""
    for source in sorted(library.SOURCES.glob("*.cu")):
        if "__global__" in source.read_text():  # device.cu has no kernel
            file = machine_object(source)
            parts = [file.read_bytes(), arch, version("nvcc"), version("cuobjdump")]
            found += disk_cache.compiled("ptx", parts, "kernels.sass", compile).read_text()
    return found


def code_of_build(arch):
    """The disassembly of the library that build.py makes. It takes minutes to compile, so the disk cache keeps it."""
    archs = " ".join(f"{one[3]}.{one[4]}" for one in ARCHITECTURES)
    sources = sorted([*library.SOURCES.iterdir(), *library.SOURCES.parent.glob("*.h")])

    def compile(folder):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TORCH_CUDA_ARCH_LIST", archs)
            BUILD["build"](folder / "_cuda.so")
        return folder / "_cuda.so", []

    contents = [path.read_bytes() for path in sources if path.is_file()]
    made = disk_cache.compiled("ptx", [*contents, archs, version("nvcc")], "_cuda.so", compile)
    return disassembly(made, arch)


def disassembly(file, arch):
    return toolchain.run([tool("cuobjdump"), "-sass", "-arch", arch, str(file)], "cuobjdump")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((make, arch), id=f"{make.__name__}-{arch}", marks=marks)
        for make, marks in ((code_from_machine_ptx, ()), (code_of_build, pytest.mark.slow))
        for arch in ARCHITECTURES
    ],
)
def found(request):
    """The instructions of each kernel, by the kernel's mangled name."""
    make, arch = request.param
    parts = re.split(r"\n\s*Function : (\S+)\n", make(arch))
    return dict(zip(parts[1::2], parts[2::2]))


def test_machine_code(found):
    """No kernel uses local memory. The aligned variants of streaming kernels load and store 128 bits at a time."""
    assert not [name for name, code in found.items() if re.search(r"\b(LDL|STL)\b", code)]
    for kernel in STREAMING:
        variants = {name: code for name, code in found.items() if kernel in name}
        wide = {n for n, code in variants.items() if re.search(r"\.E\.(\w+\.)*128\b", code)}
        assert wide == {name for name in variants if "Li1E" not in name} and len(wide) == len(variants) // 2
        for name in wide:
            for kind in ("LDG", "STG"):
                accesses = re.findall(rf"\b{kind}\.E[\w.]*", variants[name])
                assert sum(access.endswith("128") or ".128." in access for access in accesses) >= 0.5 * len(accesses), (
                    name
                )


def test_machine_code_of_lists_of_tensors(found):
    """The aligned variants access packs of 128 bits. They access tables and the rest of a tensor number by number."""
    packs = dict(adamw_kernel=((16, 12), (12, 10)), gradient_squares_kernel=((16, 0), (8, 0)))  # float32, 16 bits
    for kernel, (float32, half) in packs.items():
        variants = {name: code for name, code in found.items() if kernel in name}
        for name, code in variants.items():
            wanted = (0, 0) if "Li1E" in name else float32 if f"{kernel}If" in name else half
            assert tuple(len(re.findall(rf"\b{kind}\.E\S*128\b", code)) for kind in ("LDG", "STG")) == wanted, name
            assert not re.search(r"\b(LD|ST)\.E", code), name  # the compiler knows all addresses as global
        assert len(variants) == 2 * sum("Li1E" in name for name in variants) > 0


def test_machine_code_of_rows_of_any_alignment(found):
    """Packs have 128 bits, and the ends of a row go one by one. Four packs are read before the first one is used."""
    for kernel, order in PEELED.items():
        variants = {name: code for name, code in found.items() if kernel in name}
        assert len(variants) == (3 if "backward" in kernel else 6)  # dtypes, and with label smoothing
        for name, code in variants.items():
            accesses = re.findall(r"\b(LDG|STG)\.E([\w.]*)", code)
            assert order in "".join(kind[0] if width.endswith(".128") else "-" for kind, width in accesses), name


def test_machine_code_of_tensor_cores(found):
    """Products run on tensor cores. Aligned 16-bit rows go to shared memory by 16 bytes, not through registers."""
    for kernel in ("attention_kernel", "attention_backward_kernel"):
        variants = {name: code for name, code in found.items() if f"{len(kernel)}{kernel}I" in name}
        assert variants
        for name, code in variants.items():
            assert "HMMA.16816.F32" in code and "LDSM.16.M88.4" in code and "LDSM.16.MT88.4" in code, name
            aligned = re.search(r"Li\d+ELb1E", name) is not None
            assert ("LDGSTS.E.BYPASS.128" in code) == (aligned and f"{kernel}If" not in name), name
    variants = {name: code for name, code in found.items() if "product_kernelI" in name}
    assert len(variants) == 24
    for name, code in variants.items():
        layout = int(re.search(r"LayoutE(\d)", name)[1])  # whether rows or columns of a and b are dense; 3: any
        read = {kind for kind in ("M88", "MT88") if f"LDSM.16.{kind}.4" in code}
        assert "HMMA.16816.F32" in code and read == ({"M88", "MT88"}, {"M88"}, {"MT88"}, {"MT88"})[layout], name
        assert ("LDGSTS.E.BYPASS.128" in code) == (layout != 3 and "product_kernelIf" not in name), name


def test_machine_code_of_decode_attention(found):
    """Aligned keys and values are loaded by 128 bits. Those of 4 keys are read before the first one is used."""
    variants = {name: code for name, code in found.items() if "decode_attention_kernelI" in name}
    assert len(variants) == 18  # dtypes, head sizes, alignments
    for name, code in variants.items():
        widths = re.findall(r"\bLDG\.E([\w.]*)", code)
        order = "".join("L" if width.endswith(".128") else "-" for width in widths)
        assert ("L" * 8 in order) if "ELb1E" in name else ("L" not in order), name


def test_it_loads_without_a_gpu(monkeypatch):
    """Without a driver nothing is launched, and an error with a name is returned.

    The library is linked from the objects of the PTX machine, as build.py links its own.
    """
    objects = [machine_object(source) for source in BUILD["_files"](())]
    built = toolchain.link(objects, "_cuda.so", ["-cudart", "static"])
    found = ctypes.CDLL(str(built))
    found.gpt2fast_error_string.restype = ctypes.c_char_p
    assert found.gpt2fast_error_string(1) == b"invalid argument"
    for name in MODULES:
        function = (
            "product" if name in PRODUCTS else re.sub("^add_|^bias_|(?<=linear_cross_entropy)_backward", "", name)
        )
        assert hasattr(found, f"gpt2fast_{function}")
    if torch.cuda.is_available():
        return
    ours = library.CudaLibrary(built, library.SOURCES)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: None, raising=False)
    x = torch.zeros(4, 8)
    arguments = x, None, x[0], x[0], x, None, x[:, 0], x[:, 0]
    with pytest.raises(RuntimeError, match="gpt2fast_layer_norm: CUDA error 1: invalid argument"):
        ours.call("layer_norm.cu", "gpt2fast_layer_norm", *arguments, 4, 0, 8, 0, 1e-5, 0)
    with pytest.raises(RuntimeError, match=r"gpt2fast_layer_norm: CUDA error \d+: .*driver"):
        ours.call("layer_norm.cu", "gpt2fast_layer_norm", *arguments, 4, 8, 8, 0, 1e-5, 0)
    with pytest.raises(AttributeError, match=r"has no function 'gpt2fast_norm': define it extern \"C\" in a source"):
        ours.call("layer_norm.cu", "gpt2fast_norm", x)


@pytest.mark.parametrize(
    "wanted, said",
    (("7.5", "need compute capability 8.0, got 7.5"), ("sm_80", "must be like '8.0 9.0\\+PTX', got 'sm_80'")),
)
def test_architectures_that_are_none(monkeypatch, wanted, said):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    with pytest.raises(ValueError, match=said):
        BUILD["targets"](BUILD["find_nvcc"]())


def test_architectures(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;9.0a+PTX")
    found = BUILD["targets"](BUILD["find_nvcc"]())
    assert found == [f"-gencode=arch={a},code={b}" for a, b in (
        ("compute_86", "sm_86"), ("compute_90a", "sm_90a"), ("compute_90a", "compute_90a")
    )]  # fmt: skip
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    assert "-gencode=arch=compute_80,code=sm_80" in BUILD["targets"](BUILD["find_nvcc"]())


def test_without_nvcc_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setitem(BUILD["build"].__globals__, "find_nvcc", lambda: None)
    with pytest.raises(RuntimeError, match="install NVIDIA's CUDA toolkit, or set GPT2FAST_CUDA=0"):
        BUILD["build"](tmp_path / "_cuda.so")


def test_a_library_that_is_not_there_or_does_not_load(tmp_path):
    path = tmp_path / "_cuda.so"
    ours = library._OurLibrary()
    ours.path = path
    assert ours.library_reason.startswith(f"{path} is not built; GPT2FAST_CUDA=1 pip install -e .")
    said = f"{path} is not built; gpt2fast.build_cuda({str(path)!r}, *sources) builds it with nvcc"
    assert library.CudaLibrary(path, tmp_path).library_reason == said
    path.write_bytes(b"built for another machine")
    assert library.CudaLibrary(path, tmp_path).library_reason.startswith(f"{path} does not load: ")
    missing = library.CudaLibrary(path, tmp_path / "csrc").machine_reason()
    assert missing == f"the sources of _cuda.so are not there: there is no folder {tmp_path / 'csrc'}"


def test_setup_builds_it_where_it_should(monkeypatch):
    source = (ROOT / "setup.py").read_text()
    start = source.index("def wants_cuda(")
    scope = dict(os=__import__("os"), torch=torch)
    exec(source[start : source.index("\n\n", start)], scope)
    for given, cuda, nvcc, wanted in (
        (None, None, "nvcc", False),  # a CPU build of torch
        (None, "13.0", "nvcc", True),
        (None, "13.0", None, False),
        ("0", "13.0", "nvcc", False),
        ("1", None, "nvcc", True),
        ("1", None, None, True),  # and the build says that nvcc is missing
    ):
        monkeypatch.delenv("GPT2FAST_CUDA", raising=False)
        if given:
            monkeypatch.setenv("GPT2FAST_CUDA", given)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert scope["wants_cuda"](nvcc) == wanted
