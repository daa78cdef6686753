"""``gpt2fast tune``: the fastest tile sizes of the Triton kernels on this GPU, as a table for ``GPT2FAST_TILES``.

The search starts at the kernel's own tile and tries its neighbours, which differ in one field. It goes on from the
fastest tile until no neighbour is faster. A tile counts only if the op keeps the parity rule with it, and it is listed
only if it is clearly faster than the kernel's own.
"""

import functools
import importlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .gpu_stages import Where, arguments, attempt, has_gpu
from .timing import ratios, summarise

VALUES = dict(
    BLOCK_M=(16, 32, 64, 128, 256),
    BLOCK_N=(16, 32, 64, 128, 256),
    BLOCK_K=(32, 64, 128),
    BLOCK_S=(16, 32, 64, 128),
    num_warps=(2, 4, 8),
    num_stages=(1, 2, 3, 4, 5),
)
CLEARLY = 1.03  # a listed tile is so many times as fast as the kernel's own, and faster in 9 of 10 pairs
HEADS = (32, 64, 128, 256)


@dataclass(frozen=True)
class Job:
    """A key of a kernel's table of tiles, with a call at GPT-2's sizes that uses the tile of this key."""

    kernel: str
    key: tuple
    op: str
    case: dict[str, Any]
    dtype: torch.dtype


def jobs() -> Iterator[Job]:
    for wide, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        for rows in (16, 512, 8192):
            case = dict(B=1, T=rows, K=768, N=3072, bias=True, activation="gelu_tanh")
            yield Job("linear_kernel", (rows, wide), "linear", case, dtype)
        for D in HEADS:
            case = dict(B=4, T=1024, S=1024, H=768 // D, D=D)
            yield Job("attention_kernel", (D, wide), "attention", case, dtype)
            for part in ("q", "kv"):
                yield Job(f"attention_backward_{part}_kernel", (D, wide), "attention_backward", case, dtype)
            with_bias = dict(B=4, T=256, S=256, H=768 // D, D=D, bias="B H T S")
            yield Job("attention_backward_bias_kernel", (D, wide), "attention_backward", with_bias, dtype)
            case = dict(B=8, T=1, S=1024, H=768 // D, D=D)
            yield Job("decode_attention_kernel", (D, wide), "decode_attention", case, dtype)


class Contest:
    """Compares tiles of one job. ``clock`` calls contenders in turn and returns their seconds by name."""

    def __init__(self, job: Job, where: Where, clock: Callable[[dict[str, Callable]], dict[str, list[float]]]):
        from gpt2fast.kernels import MODULES
        from gpt2fast.op import OPS
        from gpt2fast.testing.inputs import reference, truth

        module = importlib.import_module(f"gpt2fast.kernels.{MODULES[job.op]}")
        from gpt2fast.kernels.tiles import KNOWN

        self.tiles, self.key, self.clock, self.where = KNOWN[job.kernel], job.key, clock, where
        self.op, self.function = OPS[job.op], module.KERNELS[job.op][0]
        self.args = arguments(self.op, job.case, job.dtype, where.device)
        self.plain, self.truth = (function(self.op, self.args) for function in (reference, truth))
        self.own = self.tiles.rule(*job.key)
        self.seconds = {self.own: self.measure(self.own)}
        self.refused: dict[tuple, str] = {}

    def call(self, tile: tuple) -> tuple:
        with self.tiles.using(self.key, tile):
            out = self.function(**self.args)
        return out if isinstance(out, tuple) else (out,)

    def measure(self, tile: tuple) -> float:
        """The median of the seconds. Raises an exception if the tile does not run or breaks the parity rule."""
        from gpt2fast.testing import assert_close_to_truth

        for name, ours, plain, exact in zip(self.op.outputs, self.call(tile), self.plain, self.truth):
            assert_close_to_truth(ours, plain, exact, name)
        return summarise(self.clock({"tile": functools.partial(self.call, tile)})["tile"])["median"]

    def neighbours(self, tile: tuple) -> Iterator[tuple]:
        """The tiles that differ from this one in one field, by one step."""
        for i, field in enumerate(self.tiles.fields):
            values = VALUES[field]
            at = values.index(tile[i])
            for value in values[max(at - 1, 0) : at + 2]:
                if value != tile[i]:
                    yield (*tile[:i], value, *tile[i + 1 :])

    def search(self, until: float) -> tuple:
        best = self.own
        while True:
            for tile in self.neighbours(best):
                if tile in self.seconds or tile in self.refused or time.monotonic() > until:
                    continue
                tried = attempt({}, lambda tile=tile: dict(seconds=self.measure(tile)))
                if "error" in tried:
                    self.refused[tile] = tried["error"]
                else:
                    self.seconds[tile] = tried["seconds"]
            fastest = min(self.seconds, key=self.seconds.get)
            if fastest == best or time.monotonic() > until:
                return fastest
            best = fastest

    def duel(self, tile: tuple) -> dict[str, float]:
        """How many times as fast as the kernel's own tile it is, from pairs that are called in turn."""
        calls = dict(own=functools.partial(self.call, self.own), tile=functools.partial(self.call, tile))
        times = self.clock(calls)
        return ratios(times["own"], times["tile"])


def tune(wanted: list[Job], where: Where, clock: Callable, seconds: float) -> Iterator[dict]:
    """A row for each job: the fastest tile, its ratio to the kernel's own, how many ran, and whether it is listed."""
    until = time.monotonic() + seconds
    for job in wanted:
        if time.monotonic() > until:
            return
        with where.machine():
            row = dict(kernel=job.kernel, key=job.key)
            yield attempt(row, functools.partial(find, job, where, clock, until))


def find(job: Job, where: Where, clock: Callable, until: float) -> dict:
    contest = Contest(job, where, clock)
    best = contest.search(until)
    found = dict(own=contest.own, tile=best, tried=len(contest.seconds) - 1, refused=len(contest.refused), listed=False)
    if best == contest.own:
        return found
    ratio = contest.duel(best)
    return found | dict(ratio=ratio, listed=ratio["median"] >= CLEARLY and ratio["q10"] > 1)


def write(rows: list[dict], architecture: str, path: Path) -> None:
    """Writes the rows that are to be listed into the table at ``path``. Other entries there stay."""
    from gpt2fast.kernels.tiles import name_of

    table = json.loads(path.read_text()) if path.exists() else {}
    for row in rows:
        if row.get("listed"):
            table.setdefault(architecture, {}).setdefault(row["kernel"], {})[name_of(row["key"])] = list(row["tile"])
    path.write_text(json.dumps(table, indent=1) + "\n")


def describe(row: dict) -> str:
    words = f"{row['kernel']:32} {str(row['key']):14}"
    if "error" in row:
        return f"{words} FAILED: {row['error'].splitlines()[0][:120]}"
    if row["tile"] == row["own"]:
        return f"{words} {row['own']} stays; {row['tried']} others are not faster, {row['refused']} do not run"
    ratio = f"{row['ratio']['median']:.2f} x ({row['ratio']['q10']:.2f}-{row['ratio']['q90']:.2f}) of {row['own']}"
    return f"{words} {row['tile']} {ratio}{'' if row['listed'] else '; not clearly faster, not listed'}"


def main(kernels: list[str], out: Path, seconds: float, as_json: bool = False) -> int:
    if not has_gpu():
        raise RuntimeError("gpt2fast tune: there is no GPU to time kernels on")
    from gpt2fast.kernels.tiles import FIELDS, architecture

    if unknown := [name for name in kernels if name not in FIELDS]:
        raise ValueError(f"gpt2fast tune: kernel must be one of {', '.join(FIELDS)}, got {unknown[0]!r}")
    where = Where(False)
    rows = []
    for row in tune([job for job in jobs() if job.kernel in (kernels or FIELDS)], where, where.times, seconds):
        rows.append(row)
        write(rows, architecture(), out)  # after every row, in case the run is cut off
        if not as_json:
            print(describe(row), flush=True)
    if as_json:
        print(json.dumps(rows))
    elif any(row.get("listed") for row in rows):
        print(f"Use them with GPT2FAST_TILES={out}")
    else:
        print("No tile is clearly faster than the kernels' own.")
    return int(any("error" in row for row in rows))
