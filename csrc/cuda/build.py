"""Builds CUDA kernels as one shared library, without torch: ``python csrc/cuda/build.py OUT.so [SOURCES]``.

If no sources are given, it builds gpt2fast's own kernels. ``gpt2fast.build_cuda`` does the same for the kernels of
another package. The build needs nvcc (found by ``CUDA_HOME``, ``CUDA_PATH``, PATH or in /usr/local/cuda), but no GPU.

CUDA's runtime is linked statically. So the library loads even without a CUDA toolkit and without a driver, and it does
not depend on the CUDA version that torch was built with. ``TORCH_CUDA_ARCH_LIST`` names the compute capabilities, such
as ``"8.0 9.0+PTX"``. The default is those of ``ARCHITECTURES`` that nvcc knows.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
COMMON = FOLDER / "device.cu"  # gives the text of an error; it is part of every library
ARCHITECTURES = "8.0 8.6 8.9 9.0 10.0+PTX"
FLAGS = ["-O3", "-std=c++20", "-Xcompiler", "-fPIC", "-lineinfo"]


def find_nvcc() -> str | None:
    """The path of nvcc, or None if it is not found."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [Path(home) / "bin" / "nvcc" for home in homes if home]
    found = next((str(place) for place in places if place.is_file()), None) or shutil.which("nvcc")
    usual = Path("/usr/local/cuda/bin/nvcc")
    return found or (str(usual) if usual.is_file() else None)


def targets(nvcc: str) -> list[str]:
    """nvcc's options for the wanted architectures. Default ones that this nvcc does not know are left out.

    Raises ValueError if ``TORCH_CUDA_ARCH_LIST`` is malformed or names a compute capability below 8.0.
    """
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    found = []
    for text in re.split(r"[ ;]+", (wanted or ARCHITECTURES).strip()):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", text)
        if match is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST must be like '8.0 9.0+PTX', got {wanted!r}")
        if (int(match[1]), int(match[2])) < (8, 0):
            raise ValueError(f"the CUDA kernels need compute capability 8.0, got {text} in TORCH_CUDA_ARCH_LIST")
        number = match[1] + match[2] + match[3]
        if wanted is None and f"compute_{number}" not in known:
            continue
        found.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[4]:
            found.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return found


def build(out: Path, sources: Sequence[Path] = (), include: Sequence[Path] = (), flags: Sequence[str] = ()) -> None:
    """Compiles the sources (by default all .cu files beside this file) and links them to the shared library ``out``.

    ``include``: folders of headers, besides the one that has "cuda/device.cuh" and "ops.h". ``flags``: more options of
    nvcc. Raises RuntimeError if there is no nvcc, or, with nvcc's output, if a source does not compile. Raises
    FileNotFoundError if a source does not exist.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        fix = "set CUDA_HOME to its folder" if sources else "set GPT2FAST_CUDA=0 to leave them out"
        raise RuntimeError(
            "the CUDA kernels need nvcc, which is not on PATH nor in CUDA_HOME: install NVIDIA's CUDA toolkit, or "
            f"{fix}"
        )
    files = _files(sources)
    if missing := [str(file) for file in files if not file.is_file()]:
        raise FileNotFoundError(f"the CUDA kernels' sources must be files, got {missing[0]}, which is not there")
    folders = [*include, FOLDER.parent] if sources else include
    options = [*FLAGS, *targets(nvcc), *(f"-I{one}" for one in folders), *flags]
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        objects = [Path(folder) / f"{i}_{file.stem}.o" for i, file in enumerate(files)]
        commands = [[nvcc, *options, "-c", str(f), "-o", str(o)] for f, o in zip(files, objects)]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(run, commands))
        linked = out.with_name(f"{out.name}.{os.getpid()}")  # never writes into a library that another process uses
        run([nvcc, "-shared", "-cudart", "static", "-o", str(linked), *map(str, objects)])
        linked.replace(out)


def _files(sources: Sequence[Path]) -> list[Path]:
    return [*map(Path, sources), COMMON] if sources else sorted(FOLDER.glob("*.cu"))


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed:\n{done.stdout}{done.stderr}\nThe command was {' '.join(command)}")


def is_current(out: Path, sources: Sequence[Path] = (), include: Sequence[Path] = ()) -> bool:
    """Whether the library is newer than everything that it is made of: the sources, the headers and this file.

    Headers are looked for beside this file, in its parent folder, beside the sources and in ``include``.
    """
    folders = {FOLDER, FOLDER.parent, *(Path(source).parent for source in sources), *map(Path, include)}
    headers = [file for one in folders for end in ("*.h", "*.cuh", "*.hpp") for file in one.glob(end)]
    parts = [file for file in (*_files(sources), *headers, Path(__file__)) if file.is_file()]
    return Path(out).is_file() and Path(out).stat().st_mtime > max(part.stat().st_mtime for part in parts)


if __name__ == "__main__":
    build(Path(sys.argv[1]), [Path(source) for source in sys.argv[2:]])
