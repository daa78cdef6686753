"""The stages of ``make gpu``. Each is a function of where to run and of ``save``, which keeps what was found so far.

A stage calls ``save(rows=...)`` after every row, so that a stage that is cut off leaves the rows before.
"""

import contextlib
import csv
import functools
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
COUNTED = dict(B=1, T=512, C=768)  # few enough rows that the grid is the same on every device
NCU = {  # what Nsight Compute calls what the PTX machine counts
    "global_load_sectors": "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum",
    "global_store_sectors": "l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum",
    "shared_load_bank_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum",
    "shared_store_bank_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_st.sum",
}
ALSO_COUNTED = ["dram__bytes_read.sum", "dram__bytes_write.sum", "launch__registers_per_thread"]


def has_gpu() -> bool:
    return torch.cuda.is_available()


@dataclass
class Where:
    """Where a stage runs: on a GPU, or for a rehearsal on the CPU with the PTX machine."""

    rehearse: bool

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def machine(self):
        from gpt2fast.testing import ptx

        return ptx.machine() if self.rehearse else contextlib.nullcontext()

    def synchronize(self) -> None:
        if not self.rehearse:
            torch.cuda.synchronize()

    def times(self, contenders: dict[str, Callable], rounds: int = 30) -> dict[str, list[float]]:
        """The seconds of a call, with the contenders in turn. A CUDA graph is replayed between two events, after the L2
        cache was flushed.

        A call that cannot be captured runs without a graph. In a rehearsal, two calls are timed by the wall clock;
        their times mean nothing.
        """
        if self.rehearse:
            return {name: [clock(call), clock(call)] for name, call in contenders.items()}
        replays = {name: _captured(call) for name, call in contenders.items()}
        flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
        pairs: dict[str, list] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, replay in replays.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flush.zero_()
                start.record()
                replay()
                end.record()
                pairs[name].append((start, end))
        torch.cuda.synchronize()
        return {name: [start.elapsed_time(end) / 1e3 for start, end in found] for name, found in pairs.items()}


def clock(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _captured(call: Callable) -> Callable:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call
    return graph.replay


class Found(dict):
    """What a stage has found so far. To call it adds to it, and writes all of it to the stage's file."""

    def __init__(self, into: Path):
        super().__init__(json.loads(into.read_text()) if into.exists() else {})
        self.into = into

    def __call__(self, **more) -> None:
        self.update(more)
        self.into.write_text(json.dumps(self, default=str))


def run(name: str, into: Path, rehearse: bool) -> int:
    save = Found(into)
    save()
    STAGES[name](Where(rehearse), save)
    return 0


def attempt(row: dict, measure: Callable[[], dict]) -> dict:
    """The row with what ``measure`` found, or with its error: one failure must not end the others."""
    try:
        return row | measure()
    except Exception as error:
        return row | dict(error=f"{type(error).__name__}: {error}")


def build(where: Where, save) -> None:
    """Builds the PTX machine and, if torch is a CUDA build, the kernels in CUDA C++. It builds in place, with the
    Python that runs this, and needs no new environment and no package index."""
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        save(skipped="Python's headers are missing: no C++ extension is built, and no counters are predicted")
        return
    command = [sys.executable, "setup.py", "-q", "build_clib", "build_ext", "--inplace"]
    # The counters need the PTX machine; no stage needs the CPU kernels.
    environment = os.environ | dict(GPT2FAST_CPU="0", GPT2FAST_PTX="1")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    save(status=done.returncode, output=(done.stdout + done.stderr)[-2000:] if done.returncode else "")
    if done.returncode:
        raise RuntimeError("the build failed; the stages go on without the C++ extensions")


def machine(where: Where, save) -> None:
    from .output import versions

    found = versions("torch", "triton", "transformers", "numpy")
    save(python=platform.python_version(), **found, cores=os.cpu_count())
    if nvcc := shutil.which("nvcc"):
        save(nvcc=subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout.strip().split("\n")[-1])
    if not where.rehearse:
        properties = torch.cuda.get_device_properties(0)
        save(gpu=properties.name, multiprocessors=properties.multi_processor_count, memory=properties.total_memory,
             capability=f"{properties.major}.{properties.minor}", l2=properties.L2_cache_size)  # fmt: skip
    save(**ceilings(where))


def ceilings(where: Where) -> dict:
    """The limits that this device reaches: bytes read and written per second by a large copy, and FLOP/s of a bfloat16
    product."""
    size, n = (1 << 16, 64) if where.rehearse else (1 << 30, 8192)
    x = torch.ones(size, dtype=torch.int8, device=where.device)
    y = torch.empty_like(x)
    a, b = (torch.randn(n, n, device=where.device).bfloat16() for _ in range(2))
    times = where.times(dict(copy=lambda: y.copy_(x), matmul=lambda: a @ b), 20)
    copy, matmul = (sorted(times[name])[len(times[name]) // 2] for name in ("copy", "matmul"))
    return dict(copy_bytes_per_second=2 * size / copy, bfloat16_flops_per_second=2 * n**3 / matmul)


def parity(where: Where, save) -> None:
    """Checks every op, dtype, case and layout on the device, by the same parity rule as everywhere, small cases first.

    After a fault such as a misaligned address, nothing runs on the device any more in this process. A new process then
    replaces it. It goes on after the run that failed, and skips what is left of that op on that target.
    """
    from gpt2fast.testing import assert_parity, find_ops, lacks, on, runs, work

    wanted = ("triton:ptx", "cuda:ptx", "fused") if where.rehearse else ("triton:gpu", "cuda:gpu", "fused:gpu")
    jobs = [(op, run) for op in find_ops([]) for run in runs(op) if run["target"] in wanted]
    jobs.sort(key=lambda job: (job[1]["layout"] != "contiguous", work(job[0], job[1]["case"])))
    if where.rehearse:  # the smallest case of every op and target
        jobs = list({(op.key, run["target"]): (op, run) for op, run in reversed(jobs)}.values())
    rows = {(op.name, t): dict(op=op.name, target=t, runs=0, wrong=0) for op, run in jobs for t in [run["target"]]}
    rows |= {(row["op"], row["target"]): row for row in save.get("rows", [])}
    failures, first, begun = save.get("failures", []), len(jobs) - save.get("left", len(jobs)), time.perf_counter()
    for done, (op, run) in enumerate(jobs[first:], first + 1):
        row = rows[op.name, run["target"]]
        if "left_out" in row:
            row["left_out"] += 1
            continue
        try:
            with on(run["target"]) as device:
                assert_parity(op, run["case"], run["dtype"], run["layout"], device=device)
        except Exception as error:
            row["wrong"] += 1
            failures.append(dict(op=op.name, run=run, error=f"{type(error).__name__}: {error}"[:600]))
            row["error"] = failures[-1]["error"] if row["wrong"] == 1 else row["error"]
        row["runs"] += 1
        faulted = not where.rehearse and device_is_lost()
        if faulted:
            row["left_out"] = 0
        if faulted or done % 20 == 0 or time.perf_counter() - begun > 60:
            save(rows=list(rows.values()), failures=failures, left=len(jobs) - done)
        if faulted:
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    lacking = {op.name: [t for t in wanted if lacks(op, t)] for op in find_ops([])}
    save(rows=list(rows.values()), failures=failures, left=0, lacking={n: t for n, t in lacking.items() if t})


def device_is_lost() -> bool:
    """Whether an earlier launch had a fault, so that nothing runs on the device any more in this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def kernel_ops() -> list:
    """The ops with a Triton kernel."""
    from gpt2fast.backends import BACKENDS
    from gpt2fast.testing import find_ops

    return [op for op in find_ops([]) if op.key in BACKENDS["triton"].kernels]


def arguments(op, case: dict, dtype: torch.dtype, device: str) -> dict:
    from gpt2fast.testing.inputs import build, every

    return {n: every(lambda t: t.to(device), v) for n, v in build(op, case, dtype).items()}


def run_one_case_an_op(where: Where, each: Callable = lambda op, call: call()) -> None:
    """Runs one case of each op that has a kernel, for tools that watch a process."""
    from gpt2fast.backends import use_backend

    for op in kernel_ops():
        letters = {k for k in op.cases[0] if k.isupper()}
        case = COUNTED if letters and letters <= {"B", "T", "C"} else op.cases[0]
        with where.machine(), use_backend("triton"):
            each(op, functools.partial(op.overload, **arguments(op, case, torch.float32, where.device)))
            where.synchronize()


def one_command(where: Where) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", "--one"] + ["--rehearse"] * where.rehearse


def sanitizer(where: Where, save) -> None:
    """Runs compute-sanitizer's memcheck and racecheck over one case of each op. A rehearsal runs the PTX machine's."""
    tool = shutil.which("compute-sanitizer")
    if not where.rehearse and tool is None:
        save(skipped="compute-sanitizer is not installed")
        return
    rows: list[dict] = []
    for what in ("memcheck", "racecheck"):
        prefix = [] if where.rehearse else [tool, "--tool", what, "--error-exitcode", "9"]
        done = subprocess.run([*prefix, *one_command(where)], cwd=ROOT, capture_output=True, text=True)
        output = done.stdout + done.stderr
        rows.append(dict(what=what, ended="clean" if done.returncode == 0 else f"exit status {done.returncode}"))
        if done.returncode:
            rows[-1]["error"] = output[-600:]
        save(tool="ptx machine" if where.rehearse else "compute-sanitizer", rows=rows)


def counters(where: Where, save) -> None:
    """Compares, launch by launch, what the PTX machine counts with what Nsight Compute counts on the device."""
    predicted: list[dict] = []

    def watch(op, call) -> None:
        from gpt2fast.testing import ptx

        call()
        for launch in ptx.active().launches:
            predicted.append(dict(op=op.name, kernel=launch.kernel, predicted={n: launch.counters[n] for n in NCU}))

    run_one_case_an_op(Where(True), watch)
    save(rows=predicted)
    if where.rehearse:
        return
    counted, failure = count_by_ncu({row["kernel"] for row in predicted})
    same = [row["kernel"] for row in predicted] == [row["kernel"] for row in counted]
    if counted and not same:
        failure = "the launches on the device are not those of the PTX machine"
    rows = [row | dict(counted=other["counted"]) for row, other in zip(predicted, counted)] if same else predicted
    save(rows=rows, ncu=counted, ncu_error=failure)


def count_by_ncu(kernels: set[str]) -> tuple[list[dict], str | None]:
    tool = shutil.which("ncu")
    if tool is None:
        return [], "ncu is not installed"
    names, metrics = f"regex:^({'|'.join(sorted(kernels))})$", [*NCU.values(), *ALSO_COUNTED]
    command = [tool, "--csv", "--page", "raw", "--kernel-name", names, "--metrics", ",".join(metrics)]
    done = subprocess.run([*command, *one_command(Where(False))], cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.split("\n") if line.startswith('"')]
    if len(lines) < 3:
        return [], (done.stdout + done.stderr)[-600:]
    back = {metric: name for name, metric in NCU.items()}
    rows = list(csv.DictReader(lines))[1:]  # the first row has the units
    return [dict(kernel=r["Kernel Name"], counted={back.get(m, m): r.get(m) for m in metrics}) for r in rows], None


def ops(where: Where, save) -> None:
    """Times our ops against PyTorch, eager and compiled, and against other libraries that can be imported."""
    from gpt2fast.backends import use_backend
    from gpt2fast.dtypes import dtype_name

    from . import cases, gpu_aims

    copy = 1.0 if where.rehearse else ceilings(where)["copy_bytes_per_second"]
    found = kernel_ops()
    jobs = [(op, smallest(op), torch.bfloat16) for op in found]
    if not where.rehearse:
        jobs = [(op, case, torch.bfloat16) for op in found for case in gpu_aims.CASES.get(op.name, [])]
        for dtype in (torch.bfloat16, torch.float32):
            jobs += [(op, case, dtype) for op in found for case in cases.bench_cases(op)]
    rows: list[dict] = []
    for op, case, dtype in jobs:
        with where.machine(), use_backend("triton"):
            row = dict(op=op.name, case=cases.describe(case), dtype=dtype_name(dtype))
            rows.append(attempt(row, functools.partial(contest, where, op, case, dtype, copy)))
        save(rows=rows, copy_bytes_per_second=copy)


def smallest(op) -> dict:
    from gpt2fast.testing import work

    return min((c for c in op.cases if 0 not in c.values()), key=lambda case: work(op, case))


def contest(where: Where, op, case: dict, dtype: torch.dtype, copy: float) -> dict:
    """One case of an op: the seconds of our kernel in Triton, of ours in CUDA C++ and of every other way, and the ratio
    to the fastest of the other ways."""
    from gpt2fast.backends import BACKENDS

    from . import cases
    from .timing import ratios, summarise

    args = arguments(op, case, dtype, where.device)
    contenders = {"ours": functools.partial(op.overload, **args)}
    cuda, kernel = BACKENDS["cuda"], BACKENDS["cuda"].kernels.get(op.key)
    if kernel is not None and (cuda.reason() or kernel.supports(**args)) is None:
        contenders["ours in CUDA C++"] = functools.partial(kernel.run, **args)
    others = {name: functools.partial(f, *args.values()) for name, f in cases.rivals(op, case).items()}
    if not where.rehearse:
        torch.compiler.reset()  # otherwise the second case would compile for dynamic sizes
        others["compiled"] = functools.partial(torch.compile(op.naive or op.fused), *args.values())
    others |= cases.peers(op, case, args)
    found: dict = {}
    for name, call in others.items():
        tried = attempt({}, lambda call=call: dict(result=call()))
        if "error" in tried:
            found.setdefault("left_out", {})[name] = tried["error"][:300]
        else:
            contenders[name] = call
    times = where.times(contenders)
    moved = sum(cases.nbytes(op, args))
    best = min((n for n in times if not n.startswith("ours")), key=lambda n: summarise(times[n])["median"])
    return found | dict(
        seconds={n: summarise(t) for n, t in times.items()},
        ratios={f"vs {best}": ratios(times[best], times["ours"])},
        share=moved / summarise(times["ours"])["median"] / copy,
        bytes=moved,
    )


def _by_rows(module: str) -> Callable:
    """A stage whose rows are those of a module's ``rows_of``."""

    def stage(where: Where, save) -> None:
        rows: list[dict] = []
        for row in importlib.import_module(f".{module}", __package__).rows_of(where):
            rows.append(row)
            save(rows=rows)

    return stage


STAGES = dict(
    build=build, machine=machine, parity=parity, streams=_by_rows("gpu_streams"), sanitizer=sanitizer, ops=ops,
    counters=counters, model=_by_rows("gpu_model"),
)  # fmt: skip
