"""GPT-2's configuration, with the names of ``config.json``. Unknown keys are kept when a file is read and written."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .dtypes import dtype_name

ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
# Keys of other models that would change what transformers computes. Their values must agree with what is computed here.
_AS_COMPUTED = {
    "is_causal": (lambda v: v in (True, None), "true"),
    "sliding_window": (lambda v: v is None, "null"),
    "attention_chunk_size": (lambda v: v is None, "null"),
    "layer_types": (lambda v: v is None or set(v) <= {"full_attention"}, "null or full_attention in every layer"),
    "pruned_heads": (lambda v: not v, "empty"),
    "quantization_config": (lambda v: v is None, "null"),
    "auto_map": (lambda v: not v, "null: code of its own is not run"),
    "is_encoder_decoder": (lambda v: not v, "false"),
}
DTYPES = ("float32", "bfloat16", "float16", "float64")
LARGEST = 2**31 - 1  # the largest value of a size
MOST_LAYERS = 10_000  # more must be a broken file; the check keeps such a model from being built


@dataclass
class Config:
    """Sizes and switches of a GPT-2, named as in its checkpoints' ``config.json``.

    ``n_inner`` None means 4 n_embd. ``dtype`` is the dtype in which the weights were saved. ``extra`` has the keys of
    the file that are not fields here. Errors: ValueError or TypeError with the name of the field, what is expected and
    what it got.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    reorder_and_upcast_attn: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    dtype: str | None = None
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
            value, most = getattr(self, name), MOST_LAYERS if name == "n_layer" else LARGEST
            allowed = "None or " * (name == "n_inner") + f"a positive integer of at most {most}"
            self._need((name, value) == ("n_inner", None) or (_is_int(value) and 0 < value <= most), name, allowed)
        self._need(self.n_embd % self.n_head == 0, "n_embd", f"a multiple of n_head = {self.n_head}")
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            self._need(_is_number(getattr(self, name)) and 0 <= getattr(self, name) < 1, name, "a number in [0, 1)")
        for name in ("layer_norm_epsilon", "initializer_range"):
            self._need(_is_number(getattr(self, name)) and getattr(self, name) >= 0, name, "a number of at least 0")
        for item in fields(self):
            if item.type is bool:
                self._need(isinstance(getattr(self, item.name), bool), item.name, "true or false")
        self._need(isinstance(self.activation_function, str), "activation_function", "a name")
        self._need(not self.add_cross_attention, "add_cross_attention", "false (use the drop-in classes for it)")
        for name in ("bos_token_id", "pad_token_id"):
            self._need(getattr(self, name) is None or _is_int(getattr(self, name)), name, "None or an integer")
        ids = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        self._need(ids == [None] or all(map(_is_int, ids)), "eos_token_id", "None, an integer or a list of integers")
        self._need(self.dtype is None or self.dtype in DTYPES, "dtype", f"None or one of {', '.join(DTYPES)}")

        for name, (fine, expected) in _AS_COMPUTED.items():
            if name in self.extra and not fine(self.extra[name]):
                raise ValueError(f"gpt2fast.Config: {name} must be {expected}, got {self.extra[name]!r}")

    def _need(self, fine: bool, name: str, expected: str) -> None:
        if not fine:
            raise ValueError(f"gpt2fast.Config: {name} must be {expected}, got {getattr(self, name)!r}")

    @property
    def inner(self) -> int:
        """The width of the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def eos_tokens(self) -> list[int]:
        ids = self.eos_token_id
        return [] if ids is None else ids if isinstance(ids, list) else [ids]

    def scale(self, layer: int) -> float:
        """The factor on the attention scores of layer ``layer``."""
        scale = self.head_size**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """A Config from the content of a ``config.json``. transformers' longer names of the keys are accepted too."""
        kind = values.get("model_type", "gpt2")
        if kind != "gpt2":
            raise ValueError(f"gpt2fast.Config: model_type must be 'gpt2', got {kind!r}")
        known = {item.name for item in fields(cls)} - {"extra"}
        given: dict[str, Any] = {}
        extra: dict[str, Any] = {}
        for key, value in values.items():
            name = ALIASES.get(key, "dtype" if key == "torch_dtype" else key)
            if name not in known:
                extra[key] = value
            elif name == key or name not in values:
                given[name] = dtype_name(value) if name == "dtype" and value is not None else value
        return cls(**given, extra=extra)

    def to_dict(self) -> dict[str, Any]:
        """The content of a ``config.json``, which transformers reads as that of a GPT2LMHeadModel."""
        own = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "extra"}
        if self.dtype is None:
            del own["dtype"]
        return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"} | self.extra | own

    @classmethod
    def load(cls, path: str | Path) -> "Config":
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"gpt2fast.Config: {path} is not valid JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"gpt2fast.Config: {path} must hold a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
