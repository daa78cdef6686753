"""A core of the machine that records launches instead of running them. It is for tests of what surrounds the core."""

import re
import sys
from types import ModuleType

import pytest

import gpt2fast

SIZES = {"64": 8, "32": 4, "16": 2, "8": 1}


class RecordingModule:
    """The interface of gpt2fast._ptx.Module. Launches return ``outcome``; ``launches`` keeps what they were given."""

    outcome: dict = {}
    launches: list = []

    def __init__(self, text: str):
        self._headers = dict(re.findall(r"\.entry\s+(\w+)\s*\((.*?)\)", text, re.S))
        self.kernels = list(self._headers)

    def params(self, kernel: str) -> list[dict]:
        found, offset = [], 0
        pattern = r"\.param\s+\.(\w+)(?:\s+\.ptr[^\n,]*?)?\s+(\w+?_param_\d+)"
        for kind, name in re.findall(pattern, self._headers[kernel]):
            size = SIZES[kind[1:]]
            offset = -(-offset // size) * size
            found.append(dict(name=name, type=kind, bytes=size, align=size, offset=offset))
            offset += size
        return found

    def launch(self, kernel, grid, block, shared, params, buffers, budget, *checks):
        self.launches.append((kernel, grid, block, shared, params, buffers))
        for _, _, name, written in buffers:
            if written is not True and name in self.outcome.get("writes", {}):
                written[self.outcome["writes"][name]] = 1
        return dict(errors=self.outcome.get("errors", []), counters=dict(thread_instructions=7))


@pytest.fixture
def recorded(monkeypatch):
    from gpt2fast.testing.ptx import machines

    class Module(RecordingModule):
        outcome, launches = {}, []

    core = ModuleType("gpt2fast._ptx")
    core.Module = Module
    monkeypatch.setitem(sys.modules, "gpt2fast._ptx", core)
    monkeypatch.setattr(gpt2fast, "_ptx", core, raising=False)
    machines.parse.cache_clear()
    yield Module
    machines.parse.cache_clear()
