"""``python -m benchmarks [--quick]``: limits, ops, the whole model, and a picture of both, into benchmarks/results."""

import sys
from pathlib import Path

from . import generate, ops, peak, report

RESULTS = Path(__file__).parent / "results"


def main(argv: list[str]) -> int:
    if unknown := [word for word in argv if word != "--quick"]:
        raise SystemExit(f"python -m benchmarks takes --quick only, got {unknown[0]}")
    peak.main(argv)
    failed = ops.main([*argv, "--json", str(RESULTS / "ops.json")])
    generate.main([*argv, "--json", str(RESULTS / "generate.json")])
    report.main([str(RESULTS / "ops.json"), str(RESULTS / "generate.json")])
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
