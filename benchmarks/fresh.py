"""Measures in fresh processes: the memory of a native float32 decode and the time to its first token, in both cases
above a process that only does ``import torch``."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import gpt2fast

NATIVE = """
import sys, time
import torch
from gpt2fast.model import GPT2

model = GPT2.from_pretrained(sys.argv[1])
times = []


class Clock:
    def put(self, tokens):
        times.append(time.time())

    def end(self):
        pass


model.generate(torch.arange(32)[None], max_new_tokens=32, eos_token_id=[], streamer=Clock())
reached = times[1]  # times[0]: the prompt
"""
BARE = """
import time
import torch

reached = time.time()
"""
REPORT = """
import json, pathlib, re, resource, sys

status = pathlib.Path("/proc/self/status")  # there, unlike getrusage, the peak is that of this program alone
if status.exists():
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1]) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps([reached, peak]))
"""
ROOT = Path(gpt2fast.__file__).parent.parent  # the processes import gpt2fast from here, installed or not


def _run(code: str, *args: str) -> tuple[float, int]:
    """The seconds from the start of the process until ``reached``, and the peak memory of the process in bytes."""
    start = time.time()
    command = [sys.executable, "-c", code + REPORT, *args]
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    reached, peak = json.loads(out.splitlines()[-1])
    return reached - start, peak


def measure(folder: Path, weights: int, rounds: int = 5) -> dict:
    """Medians over alternating rounds, with the files in the page cache. ``weights``: bytes of the parameters in
    ``folder``."""
    _run(BARE), _run(NATIVE, str(folder))
    pairs = [(_run(BARE), _run(NATIVE, str(folder))) for _ in range(rounds)]
    return dict(
        weights=weights,
        memory=statistics.median(n[1] - b[1] for b, n in pairs) / weights,
        start=statistics.median(n[0] / b[0] for b, n in pairs),
        bare_seconds=statistics.median(b[0] for b, _ in pairs),
        native_seconds=statistics.median(n[0] for _, n in pairs),
    )


def describe(found: dict) -> list[str]:
    if not found:
        return []
    return [
        f"Peak memory of a native float32 decode above a bare import torch: {found['memory']:.3f} x the weights "
        f"({found['weights'] / 1e6:.0f} MB)",
        f"Process start to first token: {found['native_seconds']:.2f} s, {found['start']:.2f} x a bare import torch "
        f"({found['bare_seconds']:.2f} s)",
    ]
