"""README.md and docs/: the code runs, commands parse, links and paths exist, and no environment variable is missing.

The words after a fence's language say what to do with the block. ``file=NAME`` is a listing: it is written beside the
page's program, which may import it. A block with ``no-run`` does not run. Blocks with ``nvcc``, ``triton`` or ``cxx``
(a compiler and ninja) run if these are installed. All other blocks of Python run; those of a page run one after the
other, in one program.
"""

import functools
import importlib
import importlib.util
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.utils.cpp_extension import is_ninja_available

import gpt2fast.ops  # noqa: F401  declares the ops
from gpt2fast import cli
from gpt2fast.op import OPS

ROOT = Path(__file__).parent.parent
PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))}
# Models that a page names but a test must not fetch. The shipped model replaces them.
SUBSTITUTIONS = {name: repr(str(cli.DEMO_MODEL)) for name in ('"gpt2"', '"folder"')}
# Files that builds, benchmarks and commands make. They need not exist.
MADE = ("benchmarks/results", "gpt2fast/_cuda.so", "gpt2fast/_C", "dist/", ".venv", "tiles.json")
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)^```$", re.M)


@dataclass
class Block:
    words: list[str]  # the words of the fence, with the language first
    line: int  # the number of the first line of code, from 0
    text: str

    @property
    def language(self) -> str:
        return self.words[0] if self.words else ""

    @property
    def file(self) -> str | None:
        return next((word.removeprefix("file=") for word in self.words if word.startswith("file=")), None)


def blocks(page: str) -> list[Block]:
    text = PAGES[page].read_text(encoding="utf-8")
    return [Block(m[1].split(), text[: m.start(2)].count("\n"), m[2]) for m in FENCE.finditer(text)]


def prose(page: str) -> str:
    """The page without its blocks."""
    return FENCE.sub("", PAGES[page].read_text(encoding="utf-8"))


def is_here(tool: str) -> bool:
    if tool == "cxx":
        return bool(shutil.which((os.environ.get("CXX") or "c++").split()[0])) and is_ninja_available()
    if importlib.util.find_spec("gpt2fast._ptx") is None:  # both run on this machine
        return False
    if tool == "triton":
        return importlib.util.find_spec("triton") is not None
    from gpt2fast.testing.ptx import toolchain

    try:
        return bool(toolchain.tool(tool))
    except FileNotFoundError:
        return False


def runs(block: Block) -> bool:
    if block.language != "python" or block.file or "no-run" in block.words:
        return False
    unknown = set(block.words[1:]) - {"nvcc", "triton", "cxx"}
    assert not unknown, f"line {block.line}: a block of Python has no words {unknown}"
    return all(is_here(tool) for tool in block.words[1:])


def program(page: str) -> str:
    """The page's Python. Each block keeps its line numbers, so that a traceback names the line of the page."""
    lines: list[str] = []
    for block in filter(runs, blocks(page)):
        lines += [""] * (block.line - len(lines)) + block.text.splitlines()
    text = "\n".join(lines) + "\n"
    for name, ours in SUBSTITUTIONS.items():
        text = text.replace(name, ours)
    return text + "for _test in [f for name, f in list(globals().items()) if name.startswith('test_')]:\n    _test()\n"


@pytest.mark.parametrize("page", [page for page in PAGES if any(map(runs, blocks(page)))])
def test_python_runs(page, tmp_path):
    for block in blocks(page):
        if block.file:
            (tmp_path / block.file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / block.file).write_text(block.text)
    script = tmp_path / f"{Path(page).stem.replace('-', '_')}_page.py"
    script.write_text(program(page))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{page}, at the lines of {script.name}:\n{done.stdout[-1500:]}{done.stderr[-3000:]}"


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/kernels.md"])
def test_lines_are_short(page):
    long = [line for line in PAGES[page].read_text(encoding="utf-8").splitlines() if len(line) > 120]
    assert not [line for line in long if not line.startswith("|")], f"{page}: above 120 characters"


def commands(page: str) -> list[str]:
    """The commands in blocks of shell, and `gpt2fast ...` and `make ...` in the text."""
    shell = [block.text.replace("\\\n", " ") for block in blocks(page) if block.language == "sh"]
    found = [line for text in shell for line in text.splitlines()]
    inline = re.findall(r"`((?:gpt2fast|make|python -m|pip install) [^`]+)`", prose(page))
    return [line for line in [*found, *(" ".join(text.split()) for text in inline)] if line.strip()]


def ops_of_listings() -> set[str]:
    """The ops that the pages add to gpt2fast."""
    files = [Path(block.file) for page in PAGES for block in blocks(page) if block.file]
    return {file.stem for file in files if file.parent == Path("gpt2fast/ops")}


def check_gpt2fast(words: list[str]) -> None:
    parser = cli.build_parser()
    args, rest = parser.parse_known_args(words)
    if args.command == "bench" and rest:  # its options are those of benchmarks/options.py
        args, rest = importlib.import_module("gpt2fast.benchmarks.options").parser().parse_args(rest), []
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    for name in [*getattr(args, "ops", []), *getattr(args, "names", [])]:
        assert name in OPS or "::" in name or name in ops_of_listings(), f"there is no op {name}"


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.M)[1].split()
    variables = re.findall(r"^(\w+) \?=", makefile, re.M)
    for word in words:
        name, is_variable, _ = word.partition("=")
        assert name in (variables if is_variable else targets), f"make knows no {name}"


def check_pip(words: list[str]) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if match := re.fullmatch(r"(?:\.|gpt2fast|.*\.whl)\[(.*)\]", word):
            assert set(match[1].split(",")) <= set(known), f"{word}: no such extra"


def check_module(words: list[str]) -> None:
    name = words[0]
    ours = name.startswith(("gpt2fast", "benchmarks", "kernels"))
    assert not ours or importlib.util.find_spec(name), f"there is no module {name}"


CHECKS = {
    ("gpt2fast",): check_gpt2fast,
    ("make",): check_make,
    ("pip", "install"): check_pip,
    ("python", "-m"): check_module,
}


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page, capsys):
    for line in commands(page):
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_0-9]+=\S*", words[0]):  # a variable of the environment
            words = words[1:]
        if words[:1] == ["make"]:  # its variables come as words too
            words = shlex.split(line, comments=True)
        for start, check in CHECKS.items():
            if tuple(words[: len(start)]) == start:
                try:
                    check(words[len(start) :])
                except (SystemExit, AssertionError) as error:
                    if getattr(error, "code", None) == 0:  # --help
                        continue
                    pytest.fail(f"{page}: {line}\n{error}\n{capsys.readouterr().err}")


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (PAGES[page].parent / path).resolve() if path else PAGES[page]
        assert found.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", found.read_text(encoding="utf-8")), re.M)
            assert anchor in map(slug, headings), f"{page}: {target} names no heading"


FOLDERS = ("gpt2fast/", "kernels/", "csrc/", "tests/", "benchmarks/", "docs/", ".ci/")


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    """Text in backquotes that looks like a path of the repository. NAME in it stands for any name."""
    files = {block.file for block in blocks(page)}
    for quoted in re.findall(r"`([\w./-]+)`", prose(page)):
        if not quoted.startswith(FOLDERS) or quoted.startswith(MADE) or quoted in files:
            continue
        assert list(ROOT.glob(quoted.rstrip("/").replace("NAME", "*"))), f"{page}: there is no {quoted}"


NAMES = re.compile(r"`((?:\w+\.)*[A-Za-z]\w*)(?:\(\))?`")
SOURCES = ("gpt2fast", "kernels", "csrc", "benchmarks", "tests")


@functools.cache
def words_of_sources() -> set[str]:
    """All words of the code, except those of this file."""
    suffixes = (".py", ".h", ".cpp", ".cu", ".cuh", ".toml", ".json", ".sh")
    files = [file for folder in SOURCES for file in (ROOT / folder).rglob("*") if file.suffix in suffixes]
    texts = [
        file.read_text(encoding="utf-8") for file in files if file.stat().st_size < 2**18 and file != Path(__file__)
    ]
    return set(
        re.findall(r"\w+", "\n".join([*texts, (ROOT / "Makefile").read_text(), (ROOT / "setup.py").read_text()]))
    )


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page):
    """A single name in backquotes, such as a function's, is a word of the code or of the page's own blocks.

    A name of torch must exist in torch."""
    own = set(re.findall(r"\w+", "\n".join(block.text for block in blocks(page))))
    names = set(NAMES.findall(prose(page)))
    for name in {name for name in names if name.startswith("torch.")}:
        pkgutil.resolve_name(name)
    missing = {name.split(".")[-1] for name in names if not name.startswith("torch.")} - words_of_sources() - own
    assert not missing, f"{page}: the code has no {sorted(missing)}"


READ = re.compile(
    r"""(?:environ(?:\.get\(|\[)|getenv\()\s*["'](\w+)["']|["'](\w+)["'] (?:not )?in os\.environ|\$\{([A-Z_]+):-"""
)
INDIRECT = re.compile(r"(?:environ(?:\.get\(|\[)|getenv\()(?!\s*[\"'])")
# It loops over the names in a tuple: CUDA_HOME and CUDA_PATH, which csrc/cuda/build.py reads too.
BY_NAMES_OF_A_TUPLE = ["gpt2fast/testing/ptx/toolchain.py"]


def variables_read() -> dict[str, str]:
    """For each environment variable, a file other than a test that reads it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    found: dict[str, str] = {}
    for name in listed:
        path = ROOT / name
        of_tests = name.startswith("tests/") and path.name.startswith("test_")
        if of_tests or path.suffix not in (".py", ".cpp", ".h", ".cu", ".cuh", ".sh", "") or not path.is_file():
            continue
        text = path.read_text(encoding="utf-8")
        assert not INDIRECT.search(text) or name in BY_NAMES_OF_A_TUPLE, f"{name}: write the variable's name there"
        for match in READ.finditer(text):
            found[match[1] or match[2] or match[3]] = name
    return found


def test_no_environment_variable_is_missing():
    if not (ROOT / ".git").exists():
        pytest.skip("a copy without git's list of files")
    page = PAGES["docs/environment.md"].read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `(\w+)`", page, re.M))
    read = variables_read()
    assert "GPT2FAST_CPU_ISA" in read and "GPT2FAST_BACKEND" in read and "MAX_JOBS" in read
    missing = {name: file for name, file in read.items() if name not in listed}
    assert not missing, f"docs/environment.md lacks {missing}"
    of_make = set(re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.M))
    assert of_make <= listed, f"docs/environment.md lacks make's {of_make - listed}"
    stale = listed - set(read) - of_make
    assert not stale, f"nothing reads {stale}"


def cells(page: str) -> list[list[str]]:
    """The rows of a page's tables."""
    lines = [line for line in PAGES[page].read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/how/")])
def test_figures_are_those_of_the_table_of_kernels(page):
    """Numbers like 1.74 in the tables of docs/how are in docs/kernels.md, in a row of one of the page's ops."""
    stem = Path(page).stem
    known = {cell for row in cells("docs/kernels.md") if stem in row[0] for cell in row}
    figures = [figure for row in cells(page) for cell in row for figure in re.findall(r"\b\d+\.\d\d\b", cell)]
    assert figures and not set(figures) - known, f"{page}: stale: {sorted(set(figures) - known)}"


WRONG = {
    "code": ("```python\nassert 1 == 2\n```\n", lambda page, *rest: test_python_runs(page, rest[0])),
    "test": (
        "```python\ndef test_it():\n    assert 1 == 2\n```\n",
        lambda page, *rest: test_python_runs(page, rest[0]),
    ),
    "word": ("```python no-such-word\n1\n```\n", lambda page, *rest: program(page)),
    "option": ("```sh\ngpt2fast check gelu --fast\n```\n", lambda page, *rest: test_commands_exist(page, rest[1])),
    "op": ("`gpt2fast bench no_such_op`\n", lambda page, *rest: test_commands_exist(page, rest[1])),
    "target": ("```sh\nmake tea\n```\n", lambda page, *rest: test_commands_exist(page, rest[1])),
    "variable": ("`make demo LENGTH=3`\n", lambda page, *rest: test_commands_exist(page, rest[1])),
    "extra": ("```sh\npip install '.[gpu]'\n```\n", lambda page, *rest: test_commands_exist(page, rest[1])),
    "module": ("`python -m gpt2fast.no_such`\n", lambda page, *rest: test_commands_exist(page, rest[1])),
    "link": ("[there](nowhere.md)\n", lambda page, *rest: test_links_lead_somewhere(page)),
    "anchor": ("# One\n\n[there](#two)\n", lambda page, *rest: test_links_lead_somewhere(page)),
    "name": ("`there_is_no_such_function`\n", lambda page, *rest: test_names_exist(page)),
    "path": ("`gpt2fast/no_such.py`\n", lambda page, *rest: test_paths_exist(page)),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_found(what, tmp_path, capsys, monkeypatch):
    text, check = WRONG[what]
    (tmp_path / "wrong.md").write_text(text)
    monkeypatch.setitem(PAGES, "wrong.md", tmp_path / "wrong.md")
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check("wrong.md", tmp_path, capsys)
