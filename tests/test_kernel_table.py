"""The table of what Triton's kernels take and move: its rows for two ops, and that docs/kernels.md has all of them."""

from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast.benchmarks import kernel_table
from gpt2fast.kernels import MODULES

ROOT = Path(__file__).parents[1]


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_rows():
    text = kernel_table.table(["gelu", "linear"], ("sm_80", "sm_90"))
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## sm_80", "## sm_90"]
    heads, _, *rows = cells(text.split("## sm_90")[1])
    found = [dict(zip(heads, row, strict=True)) for row in rows]
    assert [(row["op"], row["dtype"]) for row in found] == [
        ("gelu", "bfloat16"), ("gelu", "float32"), ("linear", "bfloat16"), ("linear", "float32")
    ]  # fmt: skip
    assert [row["products / least"] for row in found] == ["–", "–", "1.00", "6.00"]
    assert all(row["bytes / least"] == "1.00" for row in found[:2])
    assert all(0 < int(row["registers"]) <= 255 and row["spilled bytes"] == "0" for row in found)


def test_the_document_has_every_op_and_architecture():
    text = (ROOT / "docs/kernels.md").read_text()
    for architecture in kernel_table.ARCHITECTURES:
        _, rest = text.split(f"## {architecture}\n")
        heads, _, *rows = cells(rest.split("## ")[0])
        assert heads == list(kernel_table.HEADS)
        assert {row[0] for row in rows} == set(MODULES)
