"""``gpt2fast new-op``: writes a package with an op, its kernels and tests, to start from.

``template`` is such a package, with all kernels. A copy gets another name and only the kernels that were asked for. The
parts of a backend are files of their own, or lines that end with the backend's name in brackets, ``# [cpu]``.
"""

import importlib.util
import keyword
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

TEMPLATE = Path(__file__).parent / "template"
NAME = "scale_bias_add"  # the name of the template's op, package and namespace
FILES = dict(
    cpu=("setup.py", f"{NAME}/csrc/*"),
    triton=(f"{NAME}/triton_kernels.py",),
    cuda=(f"{NAME}/cuda_kernels.py", f"{NAME}/{NAME}.cu"),
)
BACKENDS = tuple(FILES)


def write(name: str, backends: Sequence[str] = BACKENDS, folder: Path | None = None) -> list[Path]:
    """Writes the package ``name`` with kernels for ``backends`` to ``folder`` / ``name``. Returns the files in it.

    Raises ValueError for a name that a package cannot have or an unknown backend, and FileExistsError where there is
    something of that name. Nothing is written then.
    """
    target = (folder or Path.cwd()) / name
    _check(name, backends, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    written = []
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".new-op-") as temporary:
        made = Path(temporary) / name
        for source in _files(backends):
            relative = Path(*(part.replace(NAME, name) for part in source.relative_to(TEMPLATE).parts))
            (made / relative).parent.mkdir(parents=True, exist_ok=True)
            (made / relative).write_text(_renamed(_chosen(source, backends), name), encoding="utf-8")
            written.append(relative)
        shutil.move(made, target)  # the folder appears complete or not at all
    return written


def _check(name: str, backends: Sequence[str], target: Path) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ValueError(
            f"gpt2fast new-op: NAME must be small letters, digits and _, a letter first, and no word of Python's, "
            f"got {name!r}"
        )
    if unknown := [backend for backend in backends if backend not in BACKENDS]:
        raise ValueError(f"gpt2fast new-op: backends must be of {', '.join(BACKENDS)}, got {unknown[0]!r}")
    if target.exists():
        raise FileExistsError(f"gpt2fast new-op: {target} is there already; take another name, or --out FOLDER")
    if importlib.util.find_spec(name) is not None:
        raise ValueError(f"gpt2fast new-op: NAME must not be that of a module that is installed, got {name!r}")


def _files(backends: Sequence[str]) -> list[Path]:
    others = {file for b in BACKENDS if b not in backends for pattern in FILES[b] for file in TEMPLATE.glob(pattern)}
    found = (file for file in TEMPLATE.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return sorted(file for file in found if file not in others)


def _chosen(source: Path, backends: Sequence[str]) -> str:
    """The text of a file without its marks, and without the parts of backends that were not asked for."""
    text = source.read_text(encoding="utf-8")
    # A line of Python, or an item of a list in Markdown with all its lines.
    block = r"(?m)^- (?:.+\n)+?(?=- |\n)" if source.suffix == ".md" else r"(?m)^.+\n"
    mark = r"(?:  #)? \[(cpu|triton|cuda|gpu)\]\n"

    def keep(found: re.Match) -> str:
        marked = re.search(mark, found[0])
        if marked is None:
            return found[0]
        wanted = ("triton", "cuda") if marked[1] == "gpu" else (marked[1],)
        return re.sub(mark, "\n", found[0]) if set(wanted) & set(backends) else ""

    return re.sub(block, keep, text).rstrip("\n") + "\n"


def _renamed(text: str, name: str) -> str:
    return text.replace(NAME, name).replace(_camel(NAME), _camel(name))


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))
