"""For tests of results that hold for both GPU backends, Triton and CUDA C++."""

import importlib

import pytest

from gpt2fast.cuda import library
from gpt2fast.testing import ptx

PACKAGES = dict(triton="kernels", cuda="cuda")


def kernels_of(module: str):
    """A fixture, ``run(op, arguments)``: the outputs of the kernel in ``module``, and its launches, by backend."""

    @pytest.fixture(params=PACKAGES)
    def run(request):
        if request.param == "triton":
            pytest.importorskip("triton")
        elif why := library.machine_reason():
            pytest.skip(why)
        kernels = importlib.import_module(f"gpt2fast.{PACKAGES[request.param]}.{module}").KERNELS

        def call(name, args):
            function, supports, *_ = kernels[name]
            assert supports(**args) is None
            with ptx.machine() as machine:
                return function(**args), machine.launches

        return call

    return run
