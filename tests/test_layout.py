"""Tests of the repository's layout: sizes of files, layers, names, generated text, pinned versions, and no paths of
anybody's machine."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gpt2fast.op import OPS

ROOT = Path(__file__).parent.parent
MOST_LINES = 400
CODE = {".py", ".h", ".cpp", ".cu", ".cuh", ".md", ".toml", ".yaml", ".sh", ".txt", ""}
OURS = [op for op in OPS.values() if op.namespace == "gpt2fast"]
# Stems of files in csrc/cuda that are not ops.
CUDA_HELPERS = {"activation", "attention_backward_bias", "device", "mma", "kernels", "tensor_list"}


def tracked() -> list[Path]:
    """The files that git tracks or would track: the work tree without what .gitignore names."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in names.split("\0") if name and (ROOT / name).is_file()]


def texts() -> dict[str, str]:
    return {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in tracked() if p.suffix in CODE}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [re.match(r"([\w.-]+)==([^ ;]+)", line) for line in lines]
    return {match[1].lower(): match[2] for match in found if match}


def test_files_are_short():
    long = {name: n for name, text in texts().items() if (n := text.count("\n")) > MOST_LINES}
    assert not long, f"above {MOST_LINES} lines: {long}"


def test_kernels_do_not_know_torch():
    includes = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|pybind11|Python\.h)')
    wrong = [
        name
        for name, text in texts().items()
        if name.startswith("csrc/") and not name.startswith("csrc/torch/") and includes.search(text)
    ]
    assert wrong == ["csrc/ptx/bind.cpp"], (
        f"only csrc/torch may include torch, and Python the PTX machine's bind: {wrong}"
    )
    assert set(includes.findall(texts()[wrong[0]])) == {"pybind11"}


def test_no_path_of_a_machine():
    path = re.compile(r"(?<![\w.~$}-])/(work|tmp|root|home|Users|mnt|scratch)/[\w.]")
    wrong = [f"{name}: {match[0]}" for name, text in texts().items() if (match := path.search(text))]
    assert not wrong, wrong


@pytest.mark.parametrize("op", OURS, ids=lambda op: op.name)
def test_one_name_one_stem(op):
    """An op is in gpt2fast/ops/NAME.py and csrc/cpu/NAME.h. A fusion is in the header of the op that ends its name."""
    stem = op.name.removesuffix("_backward")
    assert op.reference.__module__ == f"gpt2fast.ops.{stem}"
    kernel = f"{op.name}_run("
    headers = {p.stem: p.read_text() for p in (ROOT / "csrc/cpu").glob("*.h")}
    holds = [name for name, text in headers.items() if re.search(rf"\bvoid {re.escape(kernel)}", text)]
    fits = [name for name in holds if name == op.name or stem.endswith(name)]
    assert bool(holds) == bool(fits), f"{kernel}...) is in {holds}, not in csrc/cpu/{op.name}.h"


def test_gpu_files_are_named_after_ops():
    stems = {op.name for op in OURS}
    cuda = {p.stem for p in (ROOT / "csrc/cuda").glob("*.cu*")} - CUDA_HELPERS
    triton = {p.stem for p in (ROOT / "kernels").glob("*.py") if not p.stem.startswith("_")} - {"common", "tiles"}
    assert not triton - stems and not cuda - {stem.removesuffix("_") for stem in stems}


def test_the_limits_of_few_new_tokens_agree():
    """A cache sends at most as many new tokens to decode_attention as all its kernels take; Triton's takes more."""
    limits = {
        "gpt2fast/cache.py": "MOST_DECODED",
        "gpt2fast/cuda/decode_attention.py": "MOST_TOKENS",
        "csrc/cuda/kernels.h": "kMostNewTokens",
        "csrc/cpu/attention_pack.h": "kFewQueries",
        "kernels/decode_attention.py": "MOST_TOKENS",
    }
    found = {}
    for path, name in limits.items():
        values = re.findall(rf"\b{name} = (\d+)", (ROOT / path).read_text(encoding="utf-8"))
        assert len(values) == 1, f"{path} must give {name} one value, it gives {values}"
        found[path] = int(values[0])
    triton = found.pop("kernels/decode_attention.py")
    assert len(set(found.values())) == 1 and triton >= found["gpt2fast/cache.py"], found


def test_packages_are_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "gpt2fast").rglob("__init__.py")}
    found = {name for name in found if ".template" not in name}  # what gpt2fast new-op copies
    of_the_root = {f"gpt2fast.{folder}" for folder in ("benchmarks", "csrc", "kernels")}  # by package-dir
    assert set(listed) == found | of_the_root


def test_readme_op_table():
    from gpt2fast.testing import readme

    parts = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- ops -->")
    assert len(parts) == 3, "README.md must hold the table of ops between two lines <!-- ops -->"
    assert parts[1].strip() == readme.table().strip(), (
        "the table of ops is stale: python -m gpt2fast.testing.readme README.md"
    )


def test_linters_have_one_version():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for name, version in re.findall(r"\[([\w-]+)==([^\]]+)\]", hooks):
        assert pins()[name] == version, f"{name} in .pre-commit-config.yaml and constraints.txt"


def test_our_kernels_are_not_taken_for_hugging_faces():
    """In the repository's root, transformers finds a folder ``kernels``. It must not take it for the package."""
    code = """if True:
        import json, kernels, transformers
        from transformers.utils import is_kernels_available
        print(json.dumps([kernels.__file__, is_kernels_available(), hasattr(kernels, "__version__")]))
    """
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    where, available, has_version = json.loads(out.splitlines()[-1])
    assert Path(where) == ROOT / "kernels" / "__init__.py"
    assert not available and not has_version
