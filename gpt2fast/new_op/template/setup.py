"""Compiles the kernel in C++, once for each instruction set, against the installed gpt2fast and torch."""

from setuptools import setup

from gpt2fast.build import BuildExtension, extension

CSRC = "scale_bias_add/csrc"
compiled = extension(
    "scale_bias_add._C", [f"{CSRC}/binding.cpp"], kernels=[f"{CSRC}/scale_bias_add.h"], include_dirs=[CSRC]
)
setup(ext_modules=[compiled], cmdclass={"build_ext": BuildExtension})
