"""Importing this builds RMSNorm's kernel in C++, or finds it built, and from then on it runs the calls on the CPU.

A package that is installed builds it by a setup.py, as ``gpt2fast new-op`` writes one.
"""

from pathlib import Path

from gpt2fast import build

FOLDER = Path(__file__).parent / "csrc"
build.load("rms_norm_C", [FOLDER / "binding.cpp"], kernels=[FOLDER / "rms_norm.h"], include_dirs=[FOLDER])
