"""Lists of tensors for one launch of a GPU kernel, for any backend.

The numbers of each tensor are split into blocks of equal size. A launch has one program (a block in CUDA C++) for each
of these. Two tables in GPU memory tell a program which numbers it has. The first has the addresses and the size of each
tensor. The second has, for each program, the number of its tensor and the number of its block in that tensor. The
tables are kept and used again as long as the addresses stay the same, as they do from one step to the next.
"""

import array
import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from . import backends, extension

COLUMNS = 5  # of the table of tensors: weight, gradient, both moments, size; unused ones are 0
KEPT = 16  # the number of pairs of tables that are kept


class _Tables:
    """The two tables of a launch, on the device: ``tensors`` (n, COLUMNS) int64 and ``programs`` (p, 2) int32."""

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
    """Does in Python what ``addresses`` of the C++ extension does: the addresses and then the sizes, as bytes."""
    if not all(t.is_contiguous() for tensors in lists for t in tensors):
        return None
    found = [t.data_ptr() for tensors in lists for t in tensors]
    return array.array("q", found + [t.numel() for t in lists[0]]).tobytes()


def tables(block: int, *lists: Sequence[Tensor]) -> _Tables | None:
    """The tables for lists of tensors; the members at the same place in each list belong together.

    ``block`` is how many numbers a program has. Returns None where a tensor is not dense.
    """
    if extension._C is None or backends.cpu_counts_as_cuda():  # the PTX machine notes whose address is taken
        found = _addresses(*lists)
    else:
        found = extension._C.addresses(lists)
    return None if found is None else _tables_of(block, found, len(lists), lists[0][0].device)


def objection_to_lists(
    where: str, objection: Callable[..., str | None], what: str, tensors: Sequence[Tensor], *changed: Sequence[Tensor]
) -> str | None:
    """Why kernels named ``what`` of the backend named ``where`` do not cover lists of tensors, or None.

    ``objection`` answers that for a single tensor. The lists ``changed`` are changed in place.
    """
    if not tensors:
        return f"{what} in {where} takes at least one tensor"
    if found := objection(what, tensors[0]):
        return found
    if not all(t.is_contiguous() for members in changed for t in members):
        return f"{what} in {where} changes dense tensors only"
    return None
