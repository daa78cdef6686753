"""GPT-2, fast: fused kernels behind a drop-in for Hugging Face's GPT-2, and a kit for kernels of your own.

Importing this package imports torch and nothing else: no driver is touched, transformers and triton are imported when
something that needs them is asked for.
"""

import importlib

__version__ = "0.1.0"

_WHERE = {
    "GPT2": "model",
    "Config": "config",
    "Tokenizer": "text",
    "generate": "generate",
    "use_backend": "backends",
    "op": "op",
    "OPS": "op",
} | dict.fromkeys(
    (
        "GPT2Config",
        "GPT2DoubleHeadsModel",
        "GPT2ForQuestionAnswering",
        "GPT2ForSequenceClassification",
        "GPT2ForTokenClassification",
        "GPT2LMHeadModel",
        "GPT2Model",
        "optimize",
        "report",
        "restore",
    ),
    "hf",
)
_MODULES = ("backends", "hf", "model", "ops", "shapes", "testing")

__all__ = sorted([*_WHERE, "__version__", "ops"])  # noqa: PLE0604


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
    found = module if name in _MODULES and name not in _WHERE else getattr(module, name)
    globals()[name] = found
    return found


def __dir__():
    return __all__
