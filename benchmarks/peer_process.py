"""A process for each engine of ``python -m benchmarks.peers``. The threads of two engines would wait for each other's
cores in one process, and one engine's libraries could change how another one runs."""

import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

from .peer_engines import Engine, Rows, read_config

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
TRIES = 5


class EngineFailed(Exception):
    """An engine raised an error in its process. The message is that of the error."""


class Process:
    """An engine in its own process. The methods raise EngineFailed if the engine raises or if its process ends."""

    def __init__(self, kind: type[Engine], width: str, threads: int):
        context = multiprocessing.get_context("spawn")
        self.name, self.width = kind.name, width
        self.pipe, theirs = context.Pipe()
        before = {name: value for name, value in os.environ.items() if name in VARIABLES}
        os.environ.update(dict.fromkeys(VARIABLES, str(threads)))
        try:
            self.process = context.Process(target=serve, args=(theirs, kind, width, threads), daemon=True)
            self.process.start()
        finally:
            for name in VARIABLES:
                os.environ.pop(name)
            os.environ.update(before)
        theirs.close()

    def build(self, checkpoint: Path, folder: Path) -> float:
        """Makes and loads the model. Returns the bytes of weights that a decoding step reads."""
        return self._ask("build", checkpoint, folder)

    def decode(self, tokens: Rows, new: int) -> Rows:
        return self._ask("decode", tokens, new)

    def clock(self, tokens: Rows, new: int) -> dict[str, float]:
        """Seconds, measured in the process: ``prefill`` and, for more than one new token, ``decode``."""
        return self._ask("clock", tokens, new)

    def close(self) -> None:
        self.pipe.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()

    def _ask(self, *request: Any) -> Any:
        try:
            self.pipe.send(request)
            ok, found = self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join(5)
            raise EngineFailed(f"the process of {self.name} ended with status {self.process.exitcode}") from error
        if not ok:
            raise EngineFailed(found)
        return found


def serve(pipe, kind: type[Engine], width: str, threads: int) -> None:
    """Answers requests until the pipe is closed. What an engine prints goes to stderr: stdout may be our JSON."""
    os.dup2(2, 1)
    engine = kind(width, threads)
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        try:
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(threads)
            pipe.send((True, answer(engine, *request)))
        except Exception as error:
            pipe.send((False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))


def answer(engine: Engine, what: str, *args: Any) -> Any:
    if what == "build":
        engine.build(*args)
        return float(engine.streamed_bytes(read_config(args[0])))
    return clock(engine, *args) if what == "clock" else engine.decode(*args)


def clock(engine: Engine, tokens: Rows, new: int) -> dict[str, float]:
    """The seconds until the first token, and from there to the last one: the difference of two runs."""
    for _ in range(TRIES):
        start = time.perf_counter()
        engine.prefill(tokens)
        first = time.perf_counter() - start
        if new == 1:
            return dict(prefill=first)
        start = time.perf_counter()
        engine.decode(tokens, new)
        rest = time.perf_counter() - start - first
        if rest > 0:
            return dict(prefill=first, decode=rest)
    raise RuntimeError(f"{new} tokens took no longer than one, {TRIES} times: the machine is too busy to time this")
