"""The table of what GPU kernels use and move: its rows for two ops are right, and docs/kernels.md has all kernels."""

from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast.benchmarks import kernel_page, kernel_table
from gpt2fast.cuda import MODULES as CUDA
from gpt2fast.cuda import library
from gpt2fast.kernels import MODULES as TRITON

ROOT = Path(__file__).parents[1]


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


@pytest.mark.skipif(library.machine_reason() is not None, reason=str(library.machine_reason()))
def test_rows():
    counts = kernel_table.count(["gelu", "linear"], ("sm_80", "sm_90"))
    assert list(counts) == ["sm_80", "sm_90"] and len(counts["sm_80"]) == len(counts["sm_90"])
    heads, _, *rows = cells(kernel_page.to_markdown(dict(sm_90=counts["sm_90"])))
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
    assert tuple(kernel_page.read()) == kernel_table.ARCHITECTURES
    heads, _, *rows = cells((ROOT / "docs/kernels.md").read_text())
    assert heads == list(kernel_page.HEADS)
    wanted = {(name, "triton") for name in TRITON} | {(name, "cuda") for name in CUDA}
    assert {(row[0], row[2]) for row in rows} == wanted


def test_architectures_stand_side_by_side_where_they_differ():
    row = ["gelu", "float32", "cuda", "gelu_kernel", 128, 40, 0, 0, "75%", "1.00", "1.00", None, None]
    text = kernel_page.to_markdown(dict(sm_80=[row], sm_90=[[*row[:5], 48, *row[6:]]]))
    assert cells(text)[2] == [*row[:4], "128", "40 / 48", "0", "0", "75%", "1.00", "1.00", "–", "–"]
    text = kernel_page.document(dict(sm_80=[row], sm_90=[row], sm_100=[row]))
    assert "compiled for sm_80, sm_90 and sm_100." in text and cells(text)[2][5] == "40"


@pytest.mark.parametrize("names, message", [
    (["gelo"], "names must be ops or architectures such as sm_90, got 'gelo'"),
    (["--count", "gelu"], "--count counts all kernels, got also the names gelu"),
])  # fmt: skip
def test_wrong_names_are_refused_before_anything_is_counted(names, message, monkeypatch, capsys):
    monkeypatch.setattr(kernel_table, "count", lambda *a: pytest.fail("something was counted"))
    with pytest.raises(SystemExit, match="2"):
        kernel_table.main(names)
    assert message in capsys.readouterr().err


def test_counts_that_are_made_anew_are_kept_and_printed(monkeypatch, tmp_path, capsys):
    kept, path = kernel_page.read(), tmp_path / "kernels.json"
    made = {architecture: list(rows)[:2] for architecture, rows in kept.items()}
    monkeypatch.setattr(kernel_table, "count", lambda *a: made)
    monkeypatch.setattr(kernel_page, "write", lambda counts, write=kernel_page.write: write(counts, path))
    monkeypatch.setattr(kernel_page, "read", lambda read=kernel_page.read: read(path))
    assert kernel_table.main(["--count"]) == 0
    out = capsys.readouterr().out
    assert out == kernel_page.document(made) != kernel_page.document(kept) and out.count("| triton |") == 1
