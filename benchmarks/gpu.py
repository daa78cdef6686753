"""What a GPU has to tell, in eight minutes: ``make gpu``; ``make gpu REHEARSE=1`` runs the same script without one.

The stages run one after the other. Each has its own process and time limit, so that none can stop the next one. One
JSON file has everything that they found, even from a stage that was cut off. A short table closes the run.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMITS = dict(  # seconds: 8 minutes
    build=90, machine=15, parity=105, streams=20, sanitizer=30, ops=105, counters=15, model=100
)  # fmt: skip


def make_importable() -> None:
    """If the package is not installed, makes those of its parts importable that lie in folders of the root."""
    import gpt2fast

    if importlib.util.find_spec("gpt2fast.kernels") is None:
        gpt2fast.__path__.append(str(ROOT))


def run_stage(name: str, path: Path, rehearse: bool) -> dict:
    """Runs one stage in its own process. Returns what it left in ``path``, its seconds, and how it ended."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--stage", name, "--into", str(path)]
    start = time.perf_counter()
    # The output goes to a file: the children of a killed process could hold a pipe open.
    with open(path.with_suffix(".log"), "w+") as log:
        process = subprocess.Popen(
            command + ["--rehearse"] * rehearse, cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait(LIMITS[name] * (3 if rehearse else 1))
            ended = "done" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            ended = "cut off at its time limit"
        log.seek(0)
        tail = log.read()[-2000:]
    found = dict(ended=ended, seconds=round(time.perf_counter() - start, 1))
    if ended != "done":
        found["output"] = tail
    if path.exists():
        found["found"] = json.loads(path.read_text())
    return found


def summary(found: dict) -> list[str]:
    """One or more lines for each stage."""
    lines = []
    for name, stage in found["stages"].items():
        lines.append(f"{name:10} {stage['ended']}, {stage['seconds']} s")
        if stage["ended"] != "done" and stage.get("output"):
            lines.append("    " + stage["output"].strip().split("\n")[-1])
        got = stage.get("found") or {}
        if name == "machine":
            lines += [f"    {key}: {value}" for key, value in got.items()]
        for key in ("skipped", "prediction_error", "ncu_error"):
            lines += [f"    {got[key]}"] if got.get(key) else []
        for row in got.get("rows", []):
            lines.append("    " + describe(row, found["rehearsal"]))
    return lines


def describe(row: dict, rehearsal: bool) -> str:
    words = [str(row[k]) for k in ("op", "kernel", "what", "target", "case", "dtype") if k in row]
    if "error" in row and row["error"]:
        return " ".join([*words, "FAILED:", row["error"].strip().split("\n")[0][:160]])
    if "seconds" in row and rehearsal:
        words.append("ran: " + ", ".join(row["seconds"]))  # the times are those of the PTX machine and mean nothing
    elif "seconds" in row:
        words += [f"{n} {1e6 * s['median']:.1f} µs" for n, s in row["seconds"].items()]
        words += [f"{n} {r['median']:.2f}x ({r['q10']:.2f}-{r['q90']:.2f})" for n, r in row.get("ratios", {}).items()]
    if row.get("share") and not rehearsal:
        words.append(f"{100 * row['share']:.0f}% of the measured copy bandwidth")
    words += [
        f"{n}={row[n]}" for n in ("runs", "wrong", "left_out", "left", "predicted", "counted", "ended") if n in row
    ]
    return " ".join(words)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the PTX machine, for machines without a GPU")
    parser.add_argument("--only", metavar="A,B", help=f"these of the stages: {', '.join(LIMITS)}")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    make_importable()
    from . import gpu_aims, gpu_stages

    if args.one:
        gpu_stages.run_one_case_an_op(gpu_stages.Where(args.rehearse))
        return 0
    if args.stage:
        return gpu_stages.run(args.stage, args.into, args.rehearse)
    wanted = args.only.split(",") if args.only else list(LIMITS)
    if unknown := [name for name in wanted if name not in LIMITS]:
        parser.error(f"stage must be one of {', '.join(LIMITS)}, got {unknown[0]!r}")
    if not args.rehearse and not gpu_stages.has_gpu():
        print("gpt2fast: there is no CUDA device here; make gpu REHEARSE=1 runs the same script without one")
        return 1
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    folder.mkdir(parents=True, exist_ok=True)
    found: dict = dict(kind="gpu", rehearsal=args.rehearse, started=time.strftime("%Y-%m-%d %H:%M:%S"), stages={})
    path = folder / ("gpu-rehearsal.json" if args.rehearse else "gpu.json")
    for name in wanted:
        print(f"{name} ...", flush=True)
        part = folder / f"gpu-{name}.part"
        part.unlink(missing_ok=True)
        found["stages"][name] = run_stage(name, part, args.rehearse)
        part.unlink(missing_ok=True)
        part.with_suffix(".log").unlink(missing_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(summary(found)))
    if not args.rehearse:
        print("\n".join(["Aims:", *gpu_aims.table(found["stages"])]))
    print(f"All of it: {path}")
    stages = found["stages"].values()
    failed = [row for stage in stages for row in (stage.get("found") or {}).get("rows", []) if row.get("error")]
    return int(bool(failed) or any(stage["ended"] != "done" for stage in stages))


if __name__ == "__main__":
    sys.exit(main())
