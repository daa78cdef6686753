"""Checkpoints: finds, checks, reads and saves them. It reads safetensors and .bin files, sharded or not."""

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import memory, safetensors
from .config import Config
from .dtypes import dtype_name

FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZER_FILES = [
    *("tokenizer.json", "vocab.json", "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
]
HUB_FILES = TOKENIZER_FILES + ["config.json", "generation_config.json", "model*.safetensors", "model*.json"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BITS = {"int8": 8, "int4": 4}  # the formats of packed weights (packed.py), and the bits of a layer's weight in them
FORMATS = (*DTYPES, *BITS)
BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
PREFIX = "transformer."
UNUSED = "multiple_choice_head"  # a part of a GPT2DoubleHeadsModel that text generation does not need
MOST_LISTED = 8


def parse_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of a format of weights; None for None and for a packed format."""
    if name is None:
        return None
    if name not in FORMATS:
        raise ValueError(f"gpt2fast: weights must be one of {', '.join(FORMATS)}, got {name!r}")
    return DTYPES.get(name)


def native_name(name: str) -> str:
    """Converts a checkpoint's name to that of GPT2: ``transformer.h.0.ln_1.weight`` to ``h.0.ln_1.weight``."""
    return name.removeprefix(PREFIX)


def locate(
    source: str | Path,
    *,
    weights: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The folder of a checkpoint: ``source`` itself, or a copy of the Hugging Face hub's repository of that name.

    ``weights`` False fetches the tokenizer only. ``revision`` (branch, tag or commit), ``token`` and ``cache_dir`` are
    those of the hub. Errors: FileNotFoundError where ``source`` is neither a folder nor a name, OSError where the hub
    cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise FileNotFoundError(f"gpt2fast: a model must be a folder or a hub name, got {str(source)!r}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(
            f"gpt2fast: {str(source)!r} is no folder here, and fetching it from the hub needs huggingface_hub "
            "(pip install huggingface_hub)"
        ) from None

    def fetch(files: list[str]) -> Path:
        where = dict(revision=revision, token=token, cache_dir=cache_dir)
        return Path(snapshot_download(str(source), allow_patterns=files, **where))

    try:
        folder = fetch(HUB_FILES if weights else TOKENIZER_FILES)
        if weights and not any((folder / name).exists() for name in FILES):
            folder = fetch(HUB_FILES + ["pytorch_model*"])
    except Exception as error:  # the hub's errors have no common base class
        raise OSError(
            f"gpt2fast: {str(source)!r} is no folder here and could not be fetched from the hub: {error}"
        ) from error
    return folder


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError that names the file where it has anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"gpt2fast: {path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"gpt2fast: {path} must hold a JSON object, got {type(found).__name__}")
    return found


def load_config(folder: Path) -> Config:
    """The folder's config.json. The end and padding tokens are those of its generation_config.json, if it has one."""
    config = Config.load(folder / "config.json")
    path = folder / "generation_config.json"
    if not path.is_file():
        return config
    found = read_object(path)
    return replace(config, **{name: found[name] for name in ("eos_token_id", "pad_token_id") if name in found})


def check(expected: dict[str, tuple], found: dict[str, tuple], where: str | Path) -> None:
    """Raises ValueError that lists all missing and surplus names and all shapes that differ."""
    lines = []
    for word, names in (("missing", expected.keys() - found.keys()), ("surplus", found.keys() - expected.keys())):
        if names:
            lines.append(f"{word}: {_listed(sorted(names))}")
    wrong = [n for n in expected if n in found and expected[n] != found[n]]
    if wrong:
        lines.append("shapes: " + _listed([f"{n} must be {expected[n]}, got {found[n]}" for n in wrong]))
    if lines:
        raise ValueError(f"gpt2fast: the config does not fit the weights of {where}: {'; '.join(lines)}")


def _listed(items: list[str]) -> str:
    more = len(items) - MOST_LISTED
    return ", ".join(items[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


class Loaded:
    """A tensor that torch.load has read, with the interface of ``safetensors.Stored``."""

    def __init__(self, tensor: Tensor):
        self.tensor, self.shape, self.dtype = tensor, tuple(tensor.shape), tensor.dtype

    def need_known_dtype(self) -> torch.dtype:
        return self.dtype

    def copy_to(self, out: Tensor) -> None:
        out.copy_(self.tensor)

    def blocks(self) -> Iterator[Tensor]:
        yield self.tensor.reshape(-1)


def check_layers(n_layer: int, tensors: int, where: str | Path) -> None:
    """Raises ValueError where a config has more layers than ``where`` has tensors. Such a model must not be built."""
    if n_layer > tensors:
        raise ValueError(
            f"gpt2fast: the config does not fit the weights of {where}: "
            f"n_layer must be at most their {tensors} tensors, got {n_layer}"
        )


def select(
    where: Path, stored: dict[str, Any], expected: dict[str, tuple]
) -> tuple[dict[str, Any], Callable[[Tensor], None]]:
    """The stored tensors of a model by its own names, and the check that a tied head equals wte.weight.

    Their names and shapes must be those of ``expected``. ``where`` and ``stored`` are the results of ``open_weights``.
    """
    stored = {native_name(n): s for n, s in stored.items()}
    stored = {n: s for n, s in stored.items() if not (BUFFER.fullmatch(n) or n.startswith(UNUSED))}
    head = stored.pop("lm_head.weight", None) if "lm_head.weight" not in expected else None
    check(expected, {name: s.shape for name, s in stored.items()}, where)
    for name, tensor in stored.items():
        if not tensor.need_known_dtype().is_floating_point:
            raise TypeError(f"gpt2fast: {name} of {where} must hold floating-point numbers, got {tensor.dtype}")

    def check_head(wte: Tensor) -> None:
        if head is not None and not _equal(head, wte):
            raise ValueError(
                f"gpt2fast: lm_head.weight of {where} must equal wte.weight, since the config ties them "
                '(if it is a head of its own, set "tie_word_embeddings": false in config.json)'
            )

    return stored, check_head


def load(
    where: Path, stored: dict[str, Any], expected: dict[str, tuple], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Reads the tensors. Their names and shapes must be those of ``expected``; they are converted to ``dtype``.

    ``dtype`` None is that of the file's wte.weight. ``where`` and ``stored`` are the results of ``open_weights``.
    """
    stored, check_head = select(where, stored, expected)
    dtype = dtype or stored["wte.weight"].dtype
    state = memory.empty(expected, dtype)
    largest_first = sorted(stored, key=lambda n: -state[n].numel())
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # half of the time is the first access to memory
        list(pool.map(lambda name: stored[name].copy_to(state[name]), largest_first))
    check_head(state["wte.weight"])
    return state


def _equal(stored, tensor: Tensor) -> bool:
    flat, done = tensor.view(-1), 0
    if stored.shape != tuple(tensor.shape):
        return False
    for block in stored.blocks():
        if not torch.equal(flat[done : done + block.numel()], block.to(tensor.dtype)):
            return False
        done += block.numel()
    return True


def open_weights(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The path of the first of FILES that the folder has, and its tensors by their names in the file."""
    for name in FILES:
        path = folder / name
        if path.is_file():
            if name.endswith(".index.json"):
                return path, _open_shards(path)
            return path, _open_file(path)
    raise FileNotFoundError(f"gpt2fast: {folder} must hold one of {', '.join(FILES)}")


def _open_shards(index: Path) -> dict:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"gpt2fast: {index} must hold a JSON object with a weight_map: {error!r}") from None
    found = {}
    for file in files:
        if Path(file).name != file:
            raise ValueError(f"gpt2fast: {index} must name files of its own folder, got {file!r}")
        path = index.parent / file
        if not path.is_file():
            raise FileNotFoundError(f"gpt2fast: {index} names {file}, which is missing")
        tensors = _open_file(path)
        absent = [n for n, at in weight_map.items() if at == file and n not in tensors]
        if absent:
            raise ValueError(f"gpt2fast: {path} must hold what {index.name} says, missing: {_listed(sorted(absent))}")
        found |= {n: t for n, t in tensors.items() if weight_map.get(n) == file}
    return found


def _open_file(path: Path) -> dict:
    if path.suffix == ".safetensors":
        return dict(safetensors.read(path))
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch.load raises pickle's, zip's and its own errors for files that are corrupt
        raise ValueError(f"gpt2fast: {path} cannot be read as weights: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"gpt2fast: {path} must hold a dict of tensors")
    return {name: Loaded(tensor) for name, tensor in tensors.items()}


def save(folder: str | Path, config: Config, state: dict[str, Tensor]) -> None:
    """Writes both files next to the old ones, and replaces the old ones only when both are complete."""
    dtype = dtype_name(state["wte.weight"].dtype)
    named = {name if name.startswith("lm_head.") else PREFIX + name: tensor for name, tensor in state.items()}
    write_files(folder, config, dtype, "model.safetensors", lambda path: safetensors.write(path, named))


def write_files(folder: str | Path, config: Config, dtype: str, name: str, write: Callable[[Path], Any]) -> None:
    """Writes config.json, with this dtype, and by ``write`` the file ``name``. Old files are replaced at the end."""
    folder = Path(folder)
    writers = {
        name: write,
        "config.json": lambda path: path.write_text(replace(config, dtype=dtype).to_json(), encoding="utf-8"),
    }
    beside = {name: folder / f".{name}.{os.getpid()}.new" for name in writers}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in writers.items():
            write(beside[name])
        for name, path in beside.items():
            path.replace(folder / name)
    except OSError as error:
        raise OSError(f"gpt2fast: cannot save to {folder}: {error}") from error
    finally:
        for path in beside.values():
            if path.parent.is_dir():
                path.unlink(missing_ok=True)
