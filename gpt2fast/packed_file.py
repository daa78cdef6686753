"""Reads models into packed weights, and saves and loads packed ones. A packed model is a folder with two files:
config.json and packed.safetensors, whose metadata say format and version.
"""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from . import packed, safetensors
from . import weights as checkpoint
from .progress import progress

if TYPE_CHECKING:
    from .model import GPT2

FILE = "packed.safetensors"
VERSION = "1"  # of the layout of the bytes
METADATA = dict(version="gpt2fast.packed", weights="gpt2fast.weights", byte_order="gpt2fast.byte_order")


class PackedFile(NamedTuple):
    """A file of packed weights whose header was checked: its tensors by name, and their format, a key of BITS."""

    path: Path
    stored: dict[str, safetensors.Stored]
    weights: str


def find(folder: Path, weights: str | None) -> PackedFile | None:
    """The file of packed weights in a folder, if it has the wanted format (None: any, where there is no other file)."""
    path = folder / FILE
    if not path.is_file() or weights in checkpoint.DTYPES:
        return None
    others = any((folder / name).is_file() for name in checkpoint.FILES)
    if weights is None:
        return None if others else open_file(path)
    file = open_file(path)
    if file.weights == weights:
        return file
    if others:
        return None
    raise ValueError(f"gpt2fast: weights must be {file.weights!r}, as {path} has them, got {weights!r}")


def read_packing(model: "GPT2", where: Path, stored: dict[str, Any], weights: str) -> "GPT2":
    """Reads a checkpoint tensor by tensor into a model without contents, and packs each one before the next is read.

    ``where`` and ``stored`` are the results of ``weights.open_weights``; ``weights`` is a key of ``packed.BITS``.
    """
    chosen, check_head = checkpoint.select(where, stored, model.shapes())
    with torch.device("meta"):
        packed.convert_skeleton(model, weights)
    shown = progress(len(chosen), lambda done: f"packing as {weights}: {done} of {len(chosen)} tensors")
    for done, (name, tensor) in enumerate(chosen.items(), 1):
        wide = torch.empty(tensor.shape, dtype=packed.WIDE)
        tensor.copy_to(wide)
        if name == "wte.weight":
            check_head(wide)
        packed.take(model, name, wide)
        if shown is not None:
            shown(done)
    return model.eval()


def save(model: "GPT2", folder: str | Path) -> None:
    """Writes config.json and packed.safetensors. Old files are replaced only when both new ones are complete."""
    weights = packed.weights_of(model)
    if weights is None:
        raise TypeError("gpt2fast: model must have packed weights, got floating-point ones")
    values = dict(version=VERSION, weights=weights, byte_order=sys.byteorder)
    metadata = {METADATA[name]: value for name, value in values.items()}
    checkpoint.write_files(
        folder, model.config, "float32", FILE, lambda path: safetensors.write(path, model.state_dict(), metadata)
    )


def pack_folder(source: Path, out: Path, weights: str) -> dict[str, Any]:
    """Packs the checkpoint of a folder into the folder ``out``, with its tokenizer. What ``gpt2fast pack`` does.

    Returns the path of the file, its bytes, and those of the same weights in float32.
    """
    from .model import GPT2  # imported here, because it imports this module

    packed.need_format(weights)
    if out.resolve() == source.resolve():
        raise ValueError(f"gpt2fast: out must be another folder than the model's, got {out}")
    model = GPT2.from_pretrained(source, weights=weights)
    save(model, out)
    for name in (*checkpoint.TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    file, wide = out / FILE, unpacked_sizes(model)
    return dict(file=str(file), weights=weights, bytes=file.stat().st_size, float32_bytes=wide)


def unpacked_sizes(model: "GPT2") -> int:
    """The bytes that the model's weights have in float32."""
    sizes = {id(m.weight): m.outputs * m.inputs for m in model.modules() if isinstance(m, packed.Packed)}
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    rest = [t.numel() for name, t in held.items() if id(t) not in sizes and not name.endswith("scale")]
    return 4 * (sum(sizes.values()) + sum(rest))


def load(file: PackedFile, model: "GPT2", mmap: bool = False) -> "GPT2":
    """Reads a file of packed weights into a model without contents; with ``mmap``, pages are read as they are used.

    Errors: ValueError for names, shapes and dtypes that do not fit.
    """
    path, stored, weights = file
    with torch.device("meta"):
        packed.convert_skeleton(model, weights)
    expected = model.state_dict()
    checkpoint.check({n: tuple(t.shape) for n, t in expected.items()}, {n: s.shape for n, s in stored.items()}, path)
    for name, tensor in stored.items():
        if tensor.dtype != expected[name].dtype:
            raise ValueError(f"gpt2fast: {name} of {path} must be {expected[name].dtype}, got {tensor.dtype}")
    for name, tensor in stored.items():
        parent, _, leaf = name.rpartition(".")
        if mmap:
            value = tensor.map()
        else:
            value = torch.empty(tensor.shape, dtype=expected[name].dtype)
            tensor.copy_to(value)
        module = model.get_submodule(parent)
        is_parameter = leaf in module._parameters
        setattr(module, leaf, nn.Parameter(value, requires_grad=False) if is_parameter else value)
    return model.eval()


def open_file(path: Path) -> PackedFile:
    """Reads the header. Raises ValueError for another format, version or byte order, or a file cut short."""
    stored, metadata = safetensors.read_all(path)
    found = {name: metadata.get(key, "none") for name, key in METADATA.items()}
    for name, expected in dict(version=VERSION, byte_order=sys.byteorder).items():
        if found[name] != expected:
            raise ValueError(
                f"gpt2fast: {path} must have {name.replace('_', ' ')} {expected} of packed weights, got {found[name]}; "
                "pack the model again: gpt2fast pack"
            )
    if found["weights"] not in packed.BITS:
        raise ValueError(f"gpt2fast: {path} must hold {' or '.join(packed.BITS)} weights, got {found['weights']!r}")
    return PackedFile(path, stored, found["weights"])


def unpacked_state(model: "GPT2") -> dict[str, torch.Tensor]:
    """The rounded weights in float32 by their names in a checkpoint, with those of linear layers as (K, N)."""
    state = {}
    for name, tensor in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if not isinstance(module, packed.Packed) or leaf == "bias":
            state[name] = tensor
        elif leaf == "weight":
            weight = module.unpacked()
            state[name] = weight.t().contiguous() if isinstance(module, packed.PackedLinear) else weight
    return state
