"""``python -m benchmarks [--quick] [--out FOLDER]``: limits, ops, errors, the whole model, and a page of all of them.

Ops are timed twice. Our own code times pairs of one round (``timing.py``); the table and the picture show these. Then
pytest-benchmark times the same cases; ``pytest-benchmark compare`` reads its JSON.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from . import generate, ops, output, parity, report

RESULTS = Path("benchmarks/results")


NEEDED = ("pytest", "pytest_benchmark", "transformers")  # torch, too; all of them are in the extra "bench"


def check_extras() -> None:
    """Ends the program before anything is measured if a package is missing; names all missing ones and the fix."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise SystemExit(
            f"gpt2fast benchmarks: {', '.join(NEEDED)} must be installed, {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not: pip install 'gpt2fast[bench]'"
        )


def time_by_pytest(out: Path, quick: bool) -> int:
    """Runs test_ops_bench.py, which writes pytest-benchmark.json. Returns pytest's exit status."""
    import pytest

    pace = ["--benchmark-max-time=0.05", "--benchmark-min-rounds=3"] if quick else ["--benchmark-max-time=0.3"]
    where = Path(__file__).parent / "test_ops_bench.py"
    into = f"--benchmark-json={out / 'pytest-benchmark.json'}"
    return pytest.main(
        [str(where), "--benchmark-only", "--benchmark-quiet", *pace, into, "-q", "-p", "no:cacheprovider"]
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and fewer cases of the model")
    parser.add_argument("--out", type=output.folder, default=str(RESULTS), metavar="FOLDER", help=f"default: {RESULTS}")
    args = parser.parse_args(argv)
    check_extras()
    quick = ["--quick"] * args.quick
    found = [str(args.out / name) for name in ("ops.json", "parity.json", "generate.json")]
    failed = ops.main([*quick, "--json", found[0]])
    failed |= time_by_pytest(args.out, args.quick)
    failed |= parity.main(["--json", found[1]])
    failed |= generate.main([*quick, "--json", found[2]])
    report.main(found)
    return failed


if __name__ == "__main__":
    sys.exit(main())
