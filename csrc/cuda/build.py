"""Builds the CUDA kernels as one shared library, without torch: ``python csrc/cuda/build.py OUT.so``.

It needs nvcc (``CUDA_HOME``, PATH, or the usual place) and no GPU. CUDA's runtime is linked in, so that the library
loads where there is no CUDA toolkit and no driver, and does not care which CUDA torch was built with.
``TORCH_CUDA_ARCH_LIST`` names compute capabilities, ``"8.0 9.0+PTX"``; by default all from 8.0 on that nvcc knows.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
ARCHITECTURES = "8.0 8.6 8.9 9.0 10.0+PTX"
FLAGS = ["-O3", "-std=c++20", "-Xcompiler", "-fPIC", "-lineinfo"]


def find_nvcc() -> str | None:
    """The path of nvcc, or None."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [Path(home) / "bin" / "nvcc" for home in homes if home]
    found = next((str(place) for place in places if place.is_file()), None) or shutil.which("nvcc")
    usual = Path("/usr/local/cuda/bin/nvcc")
    return found or (str(usual) if usual.is_file() else None)


def targets(nvcc: str) -> list[str]:
    """nvcc's options for the architectures wanted; of the default ones those that it knows."""
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


def build(out: Path) -> None:
    """Compiles every source beside this file and links them; RuntimeError with nvcc's words where that fails."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError(
            "the CUDA kernels need nvcc, which is not on PATH nor in CUDA_HOME: install NVIDIA's CUDA toolkit, or set "
            "GPT2FAST_CUDA=0 to leave them out"
        )
    options = [*FLAGS, *targets(nvcc)]
    sources = sorted(FOLDER.glob("*.cu"))
    with tempfile.TemporaryDirectory() as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        commands = [[nvcc, *options, "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects)]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(run, commands))
        run([nvcc, "-shared", "-cudart", "static", "-o", str(out), *map(str, objects)])


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def is_current(out: Path) -> bool:
    """Whether the library is newer than all that it is made of."""
    parts = [*FOLDER.glob("*"), *FOLDER.parent.glob("*.h")]
    return out.is_file() and out.stat().st_mtime > max(part.stat().st_mtime for part in parts)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
