"""Tile sizes of the Triton kernels, from a table or from the kernel's own rule. Nothing is timed at run time.

A table is a JSON file such as ``{"sm_90": {"linear_kernel": {"512, false": [64, 64, 64, 4, 4]}}}``. Its levels are the
architecture (``gfx942`` is one of AMD's), the kernel, and the key, which is the list of arguments of the kernel's rule.
The value is a tile, in the order of ``FIELDS``. Two tables are asked in turn: first the file that the environment
variable ``GPT2FAST_TILES`` names (``gpt2fast tune`` writes such a file), then the project's own ``tiles.json``. If
neither has an entry, the rule decides.
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from triton.runtime import driver

# The fields of each kernel's tile: constants of the kernel (BLOCK_*) and options of Triton's launch.
FIELDS = {
    "linear_kernel": ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages"),
    "attention_kernel": ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"),
    "attention_backward_q_kernel": ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"),
    "attention_backward_kv_kernel": ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"),
    "attention_backward_bias_kernel": ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"),
    "decode_attention_kernel": ("BLOCK_S", "num_warps", "num_stages"),
}
KNOWN: dict[str, "Tiles"] = {}  # by kernel; only kernels whose module was imported are in it
Tile = tuple[int, ...]


class Tiles:
    """The tiles of a kernel. A call with a key returns the tile that the tables have for it, or else the rule's."""

    def __init__(self, kernel: str, rule: Callable[..., Tile]):
        self.kernel, self.rule, self.fields = kernel, rule, FIELDS[kernel]
        self._found: dict[tuple, Tile] = {}
        KNOWN[kernel] = self

    def __call__(self, *key) -> Tile:
        if (found := self._found.get(key)) is None:
            found = self._found[key] = self._listed(key) or self.rule(*key)
        return found

    def _listed(self, key: tuple) -> Tile | None:
        for path in sources():
            listed = read(path).get(architecture(), {}).get(self.kernel, {}).get(name_of(key))
            if listed is not None:
                return tuple(listed)
        return None

    @contextlib.contextmanager
    def using(self, key: tuple, tile: Tile) -> Iterator[None]:
        """A context in which the key has this tile."""
        before = self(*key)
        self._found[key] = tile
        try:
            yield
        finally:
            self._found[key] = before


def tiles(kernel: str) -> Callable[[Callable[..., Tile]], Tiles]:
    """A decorator that turns a rule (a function from a key to a tile) into the ``Tiles`` of ``kernel``."""
    return lambda rule: Tiles(kernel, rule)


def name_of(key: tuple) -> str:
    """A key as the tables spell it: ``(512, False)`` is ``"512, false"``."""
    return ", ".join(json.dumps(part) for part in key)


def architecture() -> str:
    """The name of the current device's architecture, such as ``sm_90`` or ``gfx942``."""
    target = driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def sources() -> list[Path]:
    """The paths of the tables, in the order in which they are asked."""
    own = os.environ.get("GPT2FAST_TILES")
    return [*([Path(own)] if own else []), Path(__file__).with_name("tiles.json")]


@functools.cache
def read(path: Path) -> dict[str, dict[str, dict[str, list[int]]]]:
    """The table in this file. Raises ValueError, which names the file and the entry, if it is not a valid table."""
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"gpt2fast: a table of tile sizes must be a file of JSON, got {path}: {error}") from error
    for arch, kernels in table.items():
        for kernel, listed in kernels.items():
            if kernel not in FIELDS:
                raise ValueError(f"gpt2fast: {path}: kernel must be one of {', '.join(FIELDS)}, got {kernel!r}")
            for key, tile in listed.items():
                fields = FIELDS[kernel]
                if len(tile) != len(fields) or not all(map(_fits, fields, tile)):
                    raise ValueError(
                        f"gpt2fast: {path}: {arch}, {kernel}, {key} must be [{', '.join(fields)}], blocks powers of 2 "
                        f"from 16 on, warps 1 to 16, stages 1 to 8; got {tile}"
                    )
    return table


def _fits(field: str, value: object) -> bool:
    if type(value) is not int:
        return False
    if field == "num_stages":
        return 1 <= value <= 8
    least, most = (1, 16) if field == "num_warps" else (16, 1024)
    return least <= value <= most and value & (value - 1) == 0
