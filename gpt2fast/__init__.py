"""GPT-2, fast: fused kernels behind a drop-in for Hugging Face's GPT-2, and a kit for kernels of your own.

Importing this package imports torch and nothing else, and does not touch a GPU driver. transformers and triton are
imported at the first use of something that needs them.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # tells type checkers and editors the names that __getattr__ finds
    from . import backends, build, hf, model, ops, shapes, testing
    from .backends import use_backend
    from .config import Config
    from .cuda.build import build_cuda
    from .cuda.library import CudaLibrary
    from .generate import generate
    from .hf import (
        GPT2Config,
        GPT2DoubleHeadsModel,
        GPT2ForQuestionAnswering,
        GPT2ForSequenceClassification,
        GPT2ForTokenClassification,
        GPT2LMHeadModel,
        GPT2Model,
        optimize,
        report,
        restore,
    )
    from .lookup import PromptLookup
    from .many import generate_many
    from .model import GPT2
    from .op import OPS, op
    from .optim import AdamW
    from .text import Tokenizer

__version__ = "0.1.0"
__all__ = [
    "GPT2",
    "OPS",
    "AdamW",
    "Config",
    "CudaLibrary",
    "GPT2Config",
    "GPT2DoubleHeadsModel",
    "GPT2ForQuestionAnswering",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2LMHeadModel",
    "GPT2Model",
    "PromptLookup",
    "Tokenizer",
    "__version__",
    "backends",
    "build",
    "build_cuda",
    "generate",
    "generate_many",
    "hf",
    "model",
    "op",
    "ops",
    "optimize",
    "report",
    "restore",
    "shapes",
    "testing",
    "use_backend",
]

_MODULES = ("backends", "build", "hf", "model", "ops", "shapes", "testing")
_ELSEWHERE = dict(
    GPT2="model",
    Config="config",
    Tokenizer="text",
    generate="generate",
    generate_many="many",
    use_backend="backends",
    op="op",
    OPS="op",
    AdamW="optim",
    PromptLookup="lookup",
    CudaLibrary="cuda.library",
    build_cuda="cuda.build",
)
_WHERE = {name: _ELSEWHERE.get(name, "hf") for name in __all__ if name not in _MODULES and name != "__version__"}


if not TYPE_CHECKING:  # type checkers would otherwise accept every misspelt name

    def __getattr__(name: str):
        if name not in _WHERE and name not in _MODULES:
            raise AttributeError(f"module 'gpt2fast' has no attribute {name!r}")
        where = _WHERE.get(name, name)
        try:
            module = importlib.import_module(f".{where}", __name__)
        except ModuleNotFoundError as error:
            if where == "hf" and (error.name or "").split(".")[0] == "transformers":
                fix = 'pip install "gpt2fast[transformers]"'
                raise ImportError(f"gpt2fast.{name} needs transformers, which is not installed: {fix}") from error
            raise
        found = getattr(module, name) if name in _WHERE else module
        globals()[name] = found
        return found


def __dir__():
    return __all__


class _Package(ModuleType):
    """``gpt2fast.op`` and ``gpt2fast.generate`` stay the functions when the modules of those names are imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _WHERE and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
