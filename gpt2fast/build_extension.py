"""An extension with kernels in C++ and the command that builds it, for a setup.py. See gpt2fast/build.py."""

from collections.abc import Sequence
from pathlib import Path

import torch
from setuptools import Extension
from torch.utils import cpp_extension

from . import build_kernels
from .build import include_path


def extension(
    name: str,
    sources: Sequence[str],
    kernels: Sequence[str] = (),
    include_dirs: Sequence[str] = (),
    cflags: Sequence[str] = (),
    **options,
) -> Extension:
    """An extension for ``setup(ext_modules=[...], cmdclass={"build_ext": gpt2fast.build.BuildExtension})``.

    Args:
        name: ``"package._C"``, by which ``load_extension`` finds it.
        sources: files in C++ with the bindings, which include "torch/binding.h".
        kernels: headers, each with one kernel, compiled once for each instruction set.
        include_dirs: folders of headers, besides gpt2fast's own.
        cflags: further options for all files.
        options: further arguments of ``torch.utils.cpp_extension.CppExtension``.
    """
    options["depends"] = [*options.get("depends", ()), *kernels]
    made = cpp_extension.CppExtension(
        name,
        list(sources),
        include_dirs=[str(include_path()), *include_dirs],
        extra_compile_args=build_kernels.binding_flags(cflags),
        **options,
    )
    made.gpt2fast_kernels = dict(headers=list(kernels), include_dirs=list(include_dirs), cflags=list(cflags))
    return made


class BuildExtension(cpp_extension.BuildExtension):
    """Compiles the kernels of extensions. It also writes the version of torch to a file next to each extension."""

    def build_extension(self, ext):
        if kernels := getattr(ext, "gpt2fast_kernels", None):
            ext.extra_objects = [*ext.extra_objects, *map(str, build_kernels.compile_kernels(**kernels))]
        super().build_extension(ext)
        built = Path(self.get_ext_fullpath(ext.name))
        (built.parent / (built.name.split(".")[0] + ".built_with")).write_text(torch.__version__)
