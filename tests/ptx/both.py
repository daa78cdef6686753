"""Helpers for tests whose results must hold for both GPU backends, Triton and CUDA C++."""

import importlib
import importlib.util

import pytest

from gpt2fast.cuda import library
from gpt2fast.op import OPS
from gpt2fast.testing import ptx
from gpt2fast.testing.inputs import outputs_of

PACKAGES = dict(triton="kernels", cuda="cuda")


def reason_against(backend: str) -> str | None:
    """Why a backend does not run here, or None if it does."""
    if backend == "triton":
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    return library.machine_reason()


def kernels_of(module: str):
    """A fixture, ``run(op, arguments)``: the outputs of the kernel in ``module``, and its launches, by backend.

    If an op changes its arguments, the outputs are changed copies of them. With ``in_place`` the given arguments
    change, and there are no outputs. ``run.module`` is the backend's module, ``run.backend`` its name.
    """

    @pytest.fixture(params=PACKAGES)
    def run(request):
        if why := reason_against(request.param):
            pytest.skip(why)
        found = importlib.import_module(f"gpt2fast.{PACKAGES[request.param]}.{module}")

        def call(name, args, in_place=False):
            function, supports, *_ = found.KERNELS[name]
            assert supports(**args) is None
            with ptx.machine() as machine:
                if OPS[name].mutates and not in_place:
                    return outputs_of(OPS[name], function, args), machine.launches
                return function(**args), machine.launches

        call.module, call.backend = found, request.param
        return call

    return run
