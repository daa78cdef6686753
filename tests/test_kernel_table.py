"""The table of what GPU kernels use and move: its rows for two ops are right, and docs/kernels.md has all kernels."""

from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast.benchmarks import kernel_table
from gpt2fast.cuda import MODULES as CUDA
from gpt2fast.cuda import library
from gpt2fast.kernels import MODULES as TRITON

ROOT = Path(__file__).parents[1]


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


@pytest.mark.skipif(library.machine_reason() is not None, reason=str(library.machine_reason()))
def test_rows():
    text = kernel_table.table(["gelu", "linear"], ("sm_80", "sm_90"))
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## sm_80", "## sm_90"]
    heads, _, *rows = cells(text.split("## sm_90")[1])
    found = [dict(zip(heads, row, strict=True)) for row in rows]
    assert [tuple(row[head] for head in ("op", "dtype", "backend", "kernel")) for row in found] == [
        (op, dtype, backend, kernels[backend])
        for op, kernels in (
            ("gelu", dict(triton="gelu_kernel", cuda="gelu_kernel")),
            ("linear", dict(triton="linear_kernel", cuda="product_kernel")),
        )
        for dtype in ("bfloat16", "float32")
        for backend in ("triton", "cuda")
    ]
    assert [row["products / least"] for row in found] == [*["–"] * 4, "1.00", "1.00", "6.00", "6.00"]
    assert all(row["bytes / least"] == "1.00" for row in found[:4])
    assert all(0 < int(row["registers"]) <= 255 and row["spilled bytes"] == "0" for row in found)


def test_the_document_has_every_op_and_architecture():
    text = (ROOT / "docs/kernels.md").read_text()
    for architecture in kernel_table.ARCHITECTURES:
        _, rest = text.split(f"## {architecture}\n")
        heads, _, *rows = cells(rest.split("## ")[0])
        assert heads == list(kernel_table.HEADS)
        wanted = {(name, "triton") for name in TRITON} | {(name, "cuda") for name in CUDA}
        assert {(row[0], row[2]) for row in rows} == wanted
