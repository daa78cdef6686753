"""CUDA graphs for the PTX machine. A replay repeats the calls that were made during the capture, on the same tensors.

As on a GPU, numbers that Python computed stay as they were, tensors keep their addresses, and calls that would wait for
the device or copy from host memory raise.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ... import values

# Calls that wait for values on the device, or copy host memory to it.
_WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select", "lift_fresh")


def _refuse_waiting(func: Any) -> None:
    name = func.overloadpacket.__name__.rstrip("_")
    if name in _WAITING or name.removeprefix("_").startswith("unique"):
        raise RuntimeError(f"operation not permitted when stream is capturing: {func} waits for the host or the device")


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        _refuse_waiting(func)
        return func(*args, **kwargs or {})


class _Recorder(TorchDispatchMode):
    """Records every call with the tensors that it made, and keeps a copy of what it overwrites."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, list[tuple[int, Tensor]]]] = []
        self.overwritten: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        _refuse_waiting(func)
        for argument, value in zip(func._schema.arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.overwritten += [(t, t.clone()) for t in tree_leaves(value) if isinstance(t, Tensor)]
        with _Watch():
            out = func(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [
            (i, t)
            for i, t in enumerate(tree_leaves(out))
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given
        ]
        self.calls.append((func, args, kwargs, made))
        return out


class CUDAGraph:
    """Stands for ``torch.cuda.CUDAGraph``. ``graph`` fills it, and ``calls`` has the names of the recorded calls."""

    def __init__(self, keep_graph: bool = False):
        self._calls: list[tuple[Callable, tuple, dict, list[tuple[int, Tensor]]]] = []
        self.replays = 0

    @property
    def calls(self) -> list[str]:
        return [str(func) for func, *_ in self._calls]

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, made in self._calls:
            found = tree_leaves(func(*args, **kwargs))
            for i, tensor in made:
                tensor.copy_(found[i])

    def reset(self) -> None:
        self._calls = []


class graph:  # noqa: N801
    """Stands for ``torch.cuda.graph``. Calls inside are captured and, as on a GPU, leave memory as it was."""

    def __init__(self, cuda_graph: CUDAGraph, pool=None, stream=None, capture_error_mode: str = "global"):
        self.into, self.recorder = cuda_graph, _Recorder()

    def __enter__(self) -> None:
        self._checkable, values.checkable = values.checkable, lambda tensor: False  # as for tensors on a GPU
        self.recorder.__enter__()

    def __exit__(self, kind, value, traceback) -> None:
        self.recorder.__exit__(kind, value, traceback)
        values.checkable = self._checkable
        for tensor, before in reversed(self.recorder.overwritten):
            tensor.copy_(before)
        if kind is None:
            self.into._calls = self.recorder.calls
