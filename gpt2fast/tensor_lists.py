"""Many tensors in one launch of a GPU kernel, of any backend: tables on the device say where their numbers are.

A launch has a program, which CUDA C++ calls a block, for each block of numbers of each tensor. Which numbers those are
it reads from two tables: of every tensor its addresses and size, and of every program its tensor and the number of its
block in that. The tables are kept for as long as the addresses are the same, which they are from step to step.
"""

import array
import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from . import backends, extension

COLUMNS = 5  # of the table of tensors: weight, gradient, both moments, size; unused ones are 0
KEPT = 16  # tables


class _Tables:
    """The tables of a launch: of its tensors (n, COLUMNS) and of its programs (p, 2), on the device."""

    def __init__(self, block: int, found: bytes, lists: int, device: torch.device):
        *addresses, sizes = np.frombuffer(found, np.int64).reshape(lists + 1, -1)
        rows = np.zeros((len(sizes), COLUMNS), np.int64)
        rows[:, :lists], rows[:, -1] = np.stack(addresses, 1), sizes
        programs = [(i, part) for i, size in enumerate(sizes) for part in range(-(-size // block))]
        self.tensors = torch.from_numpy(rows).to(device)
        self.programs = torch.tensor(programs, dtype=torch.int32).to(device)
        self.count = len(programs)
        self.aligned = not (rows[:, :lists] % 16).any()


_tables_of = functools.lru_cache(KEPT)(_Tables)


def _addresses(*lists: Sequence[Tensor]) -> bytes | None:
    """What ``addresses`` of the C++ extension finds, without it."""
    if not all(t.is_contiguous() for tensors in lists for t in tensors):
        return None
    found = [t.data_ptr() for tensors in lists for t in tensors]
    return array.array("q", found + [t.numel() for t in lists[0]]).tobytes()


def tables(block: int, *lists: Sequence[Tensor]) -> _Tables | None:
    """Of lists of dense tensors, of which one member each belongs together; ``block``: numbers a program. None where
    one of them is not dense."""
    if extension._C is None or backends.cpu_counts_as_cuda():  # the PTX machine watches who asks for an address
        found = _addresses(*lists)
    else:
        found = extension._C.addresses(lists)
    return None if found is None else _tables_of(block, found, len(lists), lists[0][0].device)


def objection_to_lists(
    where: str, objection: Callable[..., str | None], what: str, tensors: Sequence[Tensor], *changed: Sequence[Tensor]
) -> str | None:
    """Why kernels named ``what`` do not cover lists of tensors, of which those ``changed`` are changed in place, or
    None; ``objection``: what the backend named ``where`` answers of one tensor."""
    if not tensors:
        return f"{what} in {where} takes at least one tensor"
    if found := objection(what, tensors[0]):
        return found
    if not all(t.is_contiguous() for members in changed for t in members):
        return f"{what} in {where} changes dense tensors only"
    return None
