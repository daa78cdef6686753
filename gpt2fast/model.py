"""GPT-2: embedding -> n_layer x (x += attention(layer_norm(x)); x += mlp(layer_norm(x))) -> layer_norm -> head.

The modules hold the parameters; ``gpt2fast.ops`` do all of the computing. Training, prefill and decoding run the same
``forward``. They differ only in the ``cache``: training has none.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import activations, packed_file
from . import weights as checkpoint
from .block import attend, embed, head, heads, join, mlp, normalize, project
from .cache import Cache
from .checks import obstacle
from .config import Config
from .dtypes import dtype_name
from .generate import generate
from .loss import check_targets, head_loss
from .packed import PackedEmbedding, PackedLinear, refuse_training, weights_of


class Embedding(nn.Module):
    def __init__(self, rows: int, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size))


class LayerNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))

    forward = normalize


class Linear(nn.Module):
    """x @ weight + bias with weight (in, out), as GPT-2's checkpoints store it."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    forward = project

    def add_to(self, residual: Tensor, x: Tensor, dropout: float) -> Tensor:
        """residual + dropout(x @ weight + bias), in one op where ``block.join`` can do so."""
        return join(self, x, residual, dropping(dropout))


def dropping(p: float) -> Callable[[Tensor], Tensor] | None:
    """Dropout with probability p as a function, or None where p is 0."""
    return functools.partial(F.dropout, p=p) if p else None


class Attention(nn.Module):
    """residual + attention(x), where x (B, T, C) is the output of ln_1 and residual (B, T, C) its input."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer, self.n_head, self.scale = layer, config.n_head, config.scale(layer)
        self.attn_pdrop, self.resid_pdrop = config.attn_pdrop, config.resid_pdrop
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, residual: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        q, k, v = heads(self.c_attn(x), self.n_head)
        dropout = self.attn_pdrop if self.training else 0.0
        y = attend(q, k, v, mask, cache, self.layer, scale=self.scale, dropout=dropout)
        return join(self.c_proj, y, residual, dropping(self.resid_pdrop) if self.training else None)


class MLP(nn.Module):
    """residual + mlp(x), where x (B, T, C) is the output of ln_2 and residual (B, T, C) its input."""

    def __init__(self, config: Config):
        super().__init__()
        self.fused, self.activation = activations.find(config.activation_function)
        self.resid_pdrop = config.resid_pdrop
        self.c_fc = Linear(config.n_embd, config.inner)
        self.c_proj = Linear(config.inner, config.n_embd)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        dropout = dropping(self.resid_pdrop) if self.training else None
        return mlp(self.c_fc, self.c_proj, x, residual, self.fused, self.activation, dropout, call=Linear.__call__)


class Block(nn.Module):
    """One layer: x (B, T, C), mask (B, S) bool or None, and a cache or None, to (B, T, C)."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        x = self.attn(self.ln_1(x), x, mask, cache)
        return self.mlp(self.ln_2(x), x)


class GPT2(nn.Module):
    """GPT-2 as a language model. ``block(config, layer)`` makes each layer, so that another class can replace Block.

    Parameters have the names of GPT-2's checkpoints, such as ``h.0.attn.c_attn.weight``. ``lm_head.weight`` exists only
    where the head is not tied to ``wte.weight``.
    """

    UNUSED = checkpoint.UNUSED

    def __init__(self, config: Config | None = None, block: Callable[[Config, int], nn.Module] = Block):
        super().__init__()
        self.config = config = config or Config()
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.lm_head = None if config.tie_word_embeddings else Embedding(config.vocab_size, config.n_embd)
        if self.wte.weight.device.type != "meta":
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the matrices from a normal distribution with standard deviation ``config.initializer_range``.

        The deviation of each ``c_proj.weight``, which writes to the residual stream, is divided by sqrt(2 n_layer).
        Other parameters keep their values.
        """
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                joins = name.endswith("c_proj.weight")
                parameter.normal_(0.0, std * (2 * self.config.n_layer) ** -0.5 if joins else std)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: Cache | None = None,
        logits_to_keep: int | Tensor = 0,
        targets: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """Computes the logits, or the mean loss where targets are given.

        Args:
            input_ids: (B, T) int64.
            positions: (B, T) or (1, T) int64. By default they continue from the cache's length.
            mask: (B, T), False or 0 for padding among these tokens. The cache remembers the mask of earlier ones.
            cache: holds the keys and values of earlier tokens. Those of these tokens are added to it.
            logits_to_keep: the number of last tokens that logits are wanted for (0: all tokens), or their indices.
            targets: (B, T) int64, the token that follows each one, or -100 where the loss must ignore it.
            token_types: (B, T) int64.

        Returns: logits (B, T or fewer, V) in the weights' dtype, or the loss (), float32.
        Errors: ValueError or TypeError for a token or position out of range, a wrong shape or a wrong dtype.
        """
        mask = check_mask(mask, input_ids)
        if targets is not None:
            check_targets(targets, input_ids, self.config.vocab_size, logits_to_keep)
        elif not isinstance(logits_to_keep, Tensor) and logits_to_keep < 0:
            raise ValueError(f"gpt2fast: logits_to_keep must be at least 0, or indices, got {logits_to_keep}")
        if cache is not None:
            c, w = self.config, self.ln_f.weight
            dtype = None if torch.is_autocast_enabled(w.device.type) else w.dtype
            cache.check(len(self.h), input_ids.shape[0], c.n_head, c.head_size, dtype)
        if cache is not None and cache.fixed and positions is None:
            positions = cache.lengths[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)
        start = 0 if cache is None else cache.length
        x = embed(self.wte, self.wpe, input_ids, positions, token_types, start)
        if cache is not None:
            cache.advance(input_ids.shape[1], mask)
            mask = cache.visible()
        if self.training and self.config.embd_pdrop:
            x = F.dropout(x, self.config.embd_pdrop)
        x = self._run(x, mask, cache)
        if isinstance(logits_to_keep, Tensor):
            x = x[:, logits_to_keep]
        elif 0 < logits_to_keep < x.shape[1]:
            x = x[:, -logits_to_keep:]
        table = self.wte if self.lm_head is None else self.lm_head
        x = self.ln_f(x)
        return head(table, x) if targets is None else head_loss(x, table, targets)

    def _run(self, x: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        for block in self.h:
            x = block(x, mask, cache)
        return x

    def graph_obstacle(self) -> str | None:
        """Why a CUDA graph must not replace the calls of the modules, or None where it may.

        A module that is not stock may read values on the host, or behave differently from call to call.
        """
        stock = (GPT2, Block, Attention, MLP, Embedding, LayerNorm, Linear, nn.ModuleList)
        stock = (*stock, PackedEmbedding, PackedLinear)
        for name, module in self.named_modules():
            if found := "it is in training mode" if module.training else obstacle(module, stock):
                return f"{name or 'the model'}: {found}"
        return None

    def step_obstacle(self) -> str | None:
        """Why one call of C++ (step.py) must not replace the calls of the modules, or None."""
        if found := self.graph_obstacle():
            return found
        c, eps = self.config, self.config.layer_norm_epsilon
        for index, block in enumerate(self.h):
            attn = block.attn
            found = attn.layer, attn.n_head, attn.scale, block.mlp.fused, block.ln_1.eps, block.ln_2.eps
            if found != (index, c.n_head, c.scale(index), activations.FUSED.get(c.activation_function), eps, eps):
                return f"h.{index}: its settings are not the config's"
        return None if self.ln_f.eps == eps else "ln_f: its eps is not the config's"

    generate = generate

    def new_cache(self, batch: int, capacity: int = 64) -> Cache:
        """An empty cache for this model's sizes, dtype and device."""
        c, w = self.config, self.ln_f.weight
        return Cache(
            c.n_layer, batch, c.n_head, c.head_size,
            capacity=capacity, limit=c.n_positions, dtype=w.dtype, device=w.device,
        )  # fmt: skip

    @classmethod
    def from_state(cls, config: Config, state: dict[str, Tensor], block: Callable = Block) -> "GPT2":
        """A model in evaluation mode. Its parameters are the tensors of ``state`` themselves, without a copy."""
        checkpoint.check_layers(config.n_layer, len(state), "the given state")
        model = cls._skeleton(config, block)
        checkpoint.check(model.shapes(), {name: tuple(t.shape) for name, t in state.items()}, "the given state")
        return model._adopt(state)

    @classmethod
    def from_transformers(cls, model: nn.Module, block: Callable = Block) -> "GPT2":
        """A ``GPT2`` with the parameters of a transformers GPT2Model, or of one with a language-model head.

        The two models share the parameters. Raises ValueError that lists the parameters that do not fit the config, or
        names the part of the model that is not stock.
        """
        from .hf.native import native_state, stock_obstacle  # imported here because it needs transformers

        if found := stock_obstacle(model):
            raise ValueError(f"gpt2fast: GPT2.from_transformers takes a stock GPT-2, got one of which {found}")
        return cls.from_state(*native_state(model), block).train(model.training)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        weights: str | None = None,
        block: Callable = Block,
        mmap: bool = False,
        **hub: Any,
    ) -> "GPT2":
        """Reads a model from a checkpoint folder, or by name from the Hugging Face hub. It is in evaluation mode.

        ``weights``: the dtype of the parameters, ``"float32"``, ``"bfloat16"`` or ``"float16"``; by default the file's.
        ``"int8"`` and ``"int4"`` give packed weights, for inference on a CPU (packed.py). ``mmap``: map a file that
        ``gpt2fast pack`` has written, so that its pages are read when they are used. ``hub``: revision, token,
        cache_dir. The tokens that end a text are those of generation_config.json, if there is one. Errors: where config
        and weights do not fit, an error lists every difference before any weight is read.
        """
        dtype = checkpoint.parse_dtype(weights)
        folder = checkpoint.locate(source, **hub)
        config = checkpoint.load_config(folder)
        if file := packed_file.find(folder, weights):
            checkpoint.check_layers(config.n_layer, len(file.stored), file.path)
            return packed_file.load(file, cls._skeleton(config, block), mmap)
        if mmap:
            raise ValueError(f"gpt2fast: mmap needs a folder that gpt2fast pack has written, got {folder}")
        where, stored = checkpoint.open_weights(folder)
        checkpoint.check_layers(config.n_layer, len(stored), where)
        model = cls._skeleton(config, block)
        if weights in checkpoint.BITS:
            return packed_file.read_packing(model, where, stored, weights)
        return model._adopt(checkpoint.load(where, stored, model.shapes(), dtype))

    def save_pretrained(self, folder: str | Path, unpack: bool = False) -> None:
        """Writes config.json and model.safetensors. transformers reads the same bits back.

        A model with packed weights is written as packed.safetensors or, with ``unpack``, as float32.
        """
        if weights_of(self) is None:
            checkpoint.save(folder, self.config, self.state_dict())
        elif unpack:
            checkpoint.save(folder, self.config, packed_file.unpacked_state(self))
        else:
            packed_file.save(self, folder)

    def requires_grad_(self, requires_grad: bool = True) -> "GPT2":
        """As torch.nn.Module's. Raises TypeError where packed weights were to be trained."""
        if weights := weights_of(self):
            refuse_training(requires_grad, weights)
        return super().requires_grad_(requires_grad)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in self.named_parameters()}

    @classmethod
    def _skeleton(cls, config: Config, block: Callable) -> "GPT2":
        with torch.device("meta"):
            return cls(config, block)

    def _adopt(self, state: dict[str, Tensor]) -> "GPT2":
        for name, value in state.items():
            module, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(module), leaf, value if isinstance(value, nn.Parameter) else nn.Parameter(value))
        return self.eval()


def check_mask(mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """Returns the mask as bools; raises ValueError for a wrong shape and TypeError for a wrong dtype."""
    if mask is None:
        return None
    if mask.shape != input_ids.shape:
        raise ValueError(f"gpt2fast: mask must have input_ids' shape {tuple(input_ids.shape)}, got {tuple(mask.shape)}")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"gpt2fast: mask must hold bools or integers, got {dtype_name(mask.dtype)}")
    return mask if mask.dtype == torch.bool else mask != 0
