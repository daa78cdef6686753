"""The engines of ``python -m benchmarks.peers``, each behind the same few functions.

An engine reads the transformers checkpoint of one GPT-2, makes its own model of it, and generates greedily. Tokens go
in and come out as lists of rows, so that an engine needs no torch. Each engine runs in a process of its own
(``peer_process.py``), where only its own packages are imported.
"""

import importlib.metadata
import importlib.util
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

OURS = "gpt2fast"
WIDTHS = ("float32", "bfloat16", "int8", "int4")
Rows = list[list[int]]


class Engine(ABC):
    """An engine at one width of its weights. A subclass sets the names and has ``build`` and ``decode``.

    ``modules``: what must be importable, by the name of the package on PyPI. ``extra``: the same for single widths.
    ``bits``: the bits of a weight of a linear layer by width, scales included. ``batches``: whether one call takes
    several rows. ``exact``: whether all is computed in float32 where the weights are.
    """

    name = ""
    modules: dict[str, str] = {}
    extra: dict[str, dict[str, str]] = {}
    bits: dict[str, float] = dict(float32=32, bfloat16=16)
    batches = True
    exact = True

    def __init__(self, width: str, threads: int):
        self.width, self.threads = width, threads

    @classmethod
    def missing(cls, width: str) -> list[str]:
        """The packages that this engine needs at this width and that are not installed."""
        needed = cls.modules | cls.extra.get(width, {})
        return [package for package, module in needed.items() if importlib.util.find_spec(module) is None]

    @classmethod
    def versions(cls) -> dict[str, str]:
        packages = [*cls.modules, *(package for more in cls.extra.values() for package in more)]
        return {p: importlib.metadata.version(p) for p in dict.fromkeys(packages) if _installed(p)}

    @abstractmethod
    def build(self, checkpoint: Path, folder: Path) -> None:
        """Makes the engine's model of the checkpoint, with its files in ``folder``, and loads it."""

    @abstractmethod
    def decode(self, tokens: Rows, new: int) -> Rows:
        """The ``new`` tokens after each prompt, the most likely one each time. No token ends a row."""

    def prefill(self, tokens: Rows) -> Rows:
        """Reads the prompts and chooses one token after each."""
        return self.decode(tokens, 1)

    def streamed_bytes(self, config: dict) -> float:
        """The bytes of weights that a decoding step reads: all, but only single rows of the two tables."""
        layers, C, V = config["n_layer"], config["n_embd"], config["vocab_size"]
        matrices, vectors = 12 * layers * C * C + V * C, layers * 13 * C + 2 * C
        return matrices * self.bits[self.width] / 8 + 4 * vectors


class Gpt2fast(Engine):
    """This package's own model, by ``GPT2.from_pretrained(folder, weights=width)``."""

    name = OURS
    modules = dict(gpt2fast="gpt2fast")
    bits = dict.fromkeys(WIDTHS, 0)  # the model says what it holds

    def build(self, checkpoint: Path, folder: Path) -> None:
        from gpt2fast import GPT2

        self.model = GPT2.from_pretrained(checkpoint, weights=self.width)

    def decode(self, tokens: Rows, new: int) -> Rows:
        import torch

        found = self.model.generate(torch.tensor(tokens), max_new_tokens=new, eos_token_id=[])
        return found[:, len(tokens[0]) :].tolist()

    def streamed_bytes(self, config: dict) -> float:
        held = {id(t): t.nbytes for t in [*self.model.parameters(), *self.model.buffers()]}
        return sum(held.values()) - self.model.wpe.weight.nbytes


class Transformers(Engine):
    """Hugging Face's GPT-2 with PyTorch's fused attention."""

    name = "transformers"
    modules = dict(transformers="transformers")

    def build(self, checkpoint: Path, folder: Path) -> None:
        self.model = load_transformers(checkpoint, self.width)

    def decode(self, tokens: Rows, new: int) -> Rows:
        import torch

        ids = torch.tensor(tokens)
        with torch.inference_mode():
            found = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
            )
        return found[:, ids.shape[1] :].tolist()


def load_transformers(checkpoint: Path, width: str) -> Any:
    """transformers' model, which no token ends."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.GPT2LMHeadModel.from_pretrained(
        checkpoint, dtype=getattr(torch, width), attn_implementation="sdpa"
    ).eval()
    model.generation_config.eos_token_id = None
    return model


def read_config(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))


def _installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False
