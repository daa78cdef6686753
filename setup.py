"""Builds the three libraries of gpt2fast.

gpt2fast._C has the CPU kernels: one static library for each instruction set, and the torch extension that links them.
gpt2fast._ptx is the core of the machine that runs PTX, for authors of GPU kernels; it needs pybind11 only. Only
GPT2FAST_PTX=1 builds it. Elsewhere gpt2fast/testing/ptx/core.py compiles it at its first use. gpt2fast/_cuda.so has the
kernels in CUDA C++; it needs nvcc and no torch."""

import glob
import os
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_clib import build_clib

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths
except ImportError:
    raise SystemExit(
        "gpt2fast is built against the torch that it will run with: "
        "install torch first, then: pip install --no-build-isolation ."
    ) from None

flags = runpy.run_path("gpt2fast/compiler_flags.py")
# In CI, the use of an uninitialised variable is an error. On a user's machine the compiler only warns.
STRICT = ["-Werror=uninitialized", "-Werror=maybe-uninitialized"] * (os.environ.get("GPT2FAST_STRICT") == "1")
FLAGS = [*flags["FLAGS"], *STRICT]

headers = sorted(glob.glob("csrc/*.h") + glob.glob("csrc/*/*.h"))


def library(name, sources, own):
    cflags = [flags["KERNEL_STANDARD"], *FLAGS, *own]
    return f"gpt2fast_{name}", {"sources": sources, "cflags": cflags, "obj_deps": {"": headers}}


class BuildExtensions(BuildExtension):
    """Writes beside the extension which torch it was built with, since another torch may not load it. Also builds the
    CUDA kernels."""

    def run(self):
        super().run()
        folder = Path(self.get_ext_fullpath("gpt2fast._C")).parent
        if with_cpu:
            (folder / "_C.built_with").write_text(torch.__version__)
        if not with_ptx and not self.inplace:  # an earlier build may have left one there, and it would be installed
            for old in folder.glob("_ptx.*"):
                old.unlink()
        cuda, out = runpy.run_path("csrc/cuda/build.py"), folder / "_cuda.so"
        if wants_cuda(cuda["find_nvcc"]()) and not cuda["is_current"](out):
            cuda["build"](out)


def wants_cuda(nvcc):
    """Whether to build the CUDA kernels. GPT2FAST_CUDA=1 builds them or fails, and 0 leaves them out. If it is not set,
    they are built if torch is a CUDA build and there is an nvcc."""
    wanted = os.environ.get("GPT2FAST_CUDA")
    return wanted == "1" or (wanted != "0" and torch.version.cuda is not None and nvcc is not None)


class BuildLibraries(build_clib):
    """Compiles the libraries of the instruction sets in parallel. They share nothing but headers."""

    def build_libraries(self, libraries):
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(lambda one: build_clib.build_libraries(self, [one]), libraries))


# GPT2FAST_PTX=1 builds the PTX machine, and GPT2FAST_CPU=0 leaves out the CPU kernels.
with_ptx = os.environ.get("GPT2FAST_PTX") == "1"
with_cpu = os.environ.get("GPT2FAST_CPU") != "0"
ptx = Extension(
    "gpt2fast._ptx",
    sorted(glob.glob("csrc/ptx/*.cpp")),
    include_dirs=include_paths(),  # pybind11 comes with torch
    extra_compile_args=[*flags["PTX_FLAGS"], *STRICT],
    depends=headers,
    language="c++",
)

cpu = CppExtension(
    "gpt2fast._C",
    [*sorted(glob.glob("csrc/torch/*.cpp")), "csrc/cpu/dispatch.cpp"],
    extra_compile_args=[flags["BINDING_STANDARD"], *FLAGS, "-fopenmp"],
    depends=headers,
)

setup(
    libraries=[library(name, [f"csrc/cpu/isa_{name}.cpp"], own) for name, own in flags["isas"]().items()] * with_cpu,
    ext_modules=[cpu] * with_cpu + [ptx] * with_ptx,
    cmdclass={"build_ext": BuildExtensions, "build_clib": BuildLibraries},
)
