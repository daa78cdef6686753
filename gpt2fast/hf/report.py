"""report(model) says for each module which op runs, on which backend, and what is fused into it.

Where no op of ours runs, it says why.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.gpt2 import modeling_gpt2 as stock

from .. import backends
from ..checks import class_obstacle, is_autocast, is_plain, obstacle, weight_obstacle
from ..dtypes import dtype_name
from ..op import OPS, Op
from ..packed import WIDE, Packed, PackedLinear
from . import blocks, models
from .convert import _roots, to_ours
from .generation import FastGeneration, native_obstacle
from .packed import PackedHead

GELUS = tuple(kind for kind in blocks.ACTIVATIONS if kind.__module__ == blocks.__name__)
OPS_OF = {blocks.Conv1D: "linear", blocks.LayerNorm: "layer_norm"} | dict.fromkeys(GELUS, "gelu")
HEADS = ("score", "classifier", "qa_outputs", "multiple_choice_head")
NORMS = {"ln_1": "attn.c_attn", "ln_2": "mlp.c_fc", "ln_cross_attn": "crossattention.q_attn"}  # the layer after each


@dataclass(frozen=True)
class Line:
    """One module (or step) of a model.

    ``op`` is None where the code of PyTorch or of somebody else runs; ``reason`` says why. ``backward`` is the backend
    of the op's gradients, given for modules in training mode.
    """

    name: str
    module: str
    op: str | None
    backend: str | None = None
    fused: str | None = None
    reason: str | None = None
    backward: str | None = None

    @property
    def text(self) -> str:
        does = f"gpt2fast::{self.op}" if self.op else "module's own code"
        does += f" + {self.fused}" if self.fused else ""
        does += f" on {self.backend}" if self.backend else ""
        does += f", backward on {self.backward}" if self.backward else ""
        return does + (f"; {self.reason}" if self.reason else "")


class Report(tuple):
    """The lines of a report. ``report["transformer.h.0.attn"]`` is one of them. Equal blocks are printed as one."""

    def __getitem__(self, key):
        if isinstance(key, str):
            found = [line for line in self if line.name == key]
            if not found:
                raise KeyError(key)
            return found[0]
        return super().__getitem__(key)

    @property
    def reasons(self) -> dict[str, str]:
        """For each module where an op of ours, or a fusion, is not used, the reason, by module name."""
        return {line.name: line.reason for line in self if line.reason}

    def to_dict(self) -> list[dict]:
        return [asdict(line) for line in self]

    def __str__(self) -> str:
        rows = list(_folded(self))
        widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
        return "\n".join(f"{name:{widths[0]}}  {kind:{widths[1]}}  {text}" for name, kind, text in rows)

    __repr__ = __str__


def report(model: nn.Module) -> Report:
    """What a call of ``model`` would run now, with its present hooks, adapters, training mode and dtype.

    Raises TypeError where ``model`` has no GPT-2.
    """
    _roots(model)
    lines: list[Line] = []
    for name, module in model.named_modules():
        if isinstance(module, stock.GPT2PreTrainedModel):
            lines += _model_lines(name, module)
        elif isinstance(module, stock.GPT2Block):
            lines += _block_lines(name, module)
    known = {line.name for line in lines}
    for name, module in model.named_modules():  # our modules inside others, such as the base layer of an adapter
        if name not in known and (op := OPS_OF.get(type(module))) is not None:
            lines.append(_leaf(name, module, (type(module),), op))
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    lines.sort(key=lambda line: order.get(line.name, len(order)))  # a loss_function is not a module: it comes last
    return Report(lines)


def _line(
    name: str,
    module: nn.Module,
    op: str,
    fused: str | None = None,
    reason: str | None = None,
    head: int = 64,
    dropout: float = 0.0,
) -> Line:
    weight = next(module.parameters(), None)
    if (found := _packed_op(module, op)) is not None:
        op, weight = found
    if weight is None:
        return Line(name, type(module).__name__, op, None, fused, reason)
    with backends.recording() if module.training and backends.records([weight]) else contextlib.nullcontext():
        backend, why, _ = _choice(OPS[op], weight, head, dropout)
    backward = None
    if module.training and OPS[op].backward_ops:
        found = {other.name: _backward(other, weight, head, dropout) for other in OPS[op].backward_ops}
        if fused not in blocks.ACTIVATIONS.values():
            found = {n: on for n, on in found.items() if op != "linear" or n != "gelu_backward"}
        kinds = sorted(set(found.values()))
        backward = kinds[0] if len(kinds) == 1 else ", ".join(f"{on} ({n})" for n, on in found.items())
    return Line(name, type(module).__name__, op, backend, fused, reason or why, backward)


def _packed_op(module: nn.Module, op: str) -> tuple[str, Tensor] | None:
    """The op of a module with packed weights in place of ``op``, and a tensor with the dtype of its arguments."""
    packed = module.table if isinstance(module, PackedHead) else module
    if not isinstance(packed, Packed) or op not in ("linear", "embedding"):
        return None
    return f"int{packed.bits}_{op}", packed.scale if packed.bits == 8 else packed.bias


def _backward(op: Op, weight: Tensor, head: int, dropout: float) -> str:
    backend, _, not_fused = _choice(op, weight, head, dropout)
    return f"{backend}, since {not_fused}" if not_fused else backend


def _choice(op: Op, weight: Tensor, head: int, dropout: float) -> tuple[str, str | None, str | None]:
    """What runs the op for such a model, why no kernel of ours runs it, and why PyTorch's fused way does not."""
    sizes = dict(T=1 if op.derivative_of is None else 64)  # decoding asks for one new token, a backward pass for many
    args = op.example(_dtype(op.name, weight), weight.device, D=head, C=weight.shape[-1], K=weight.shape[0], **sizes)
    if "dropout_p" in args:
        args["dropout_p"] = dropout
    try:
        choice = backends.choose(op, **args)
    except RuntimeError as error:  # a named backend is in force and does not cover it
        return "an error", str(error), None
    return backends.describe(choice), choice.why, choice.objections.get("PyTorch")


def _dtype(op: str, weight: Tensor) -> torch.dtype:
    """The dtype of the op's arguments, with autocast. The loss gets logits of float32 where the model is float64."""
    if weight.dtype == torch.float64:  # autocast does not change it
        return torch.float32 if op == "cross_entropy" else weight.dtype
    if not is_autocast(weight) or OPS[op].autocast == "widest":
        return weight.dtype
    return torch.float32 if OPS[op].autocast == "float32" else torch.get_autocast_dtype(weight.device.type)


def _own(name: str, module: nn.Module, reason: str) -> Line:
    return Line(name, type(module).__name__, None, reason=reason)


def _join(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _model_lines(name: str, model: nn.Module) -> Iterator[Line]:
    ours = type(model) in to_ours().values()
    if not ours:
        unlike = "gpt2fast.optimize has not switched it" if type(model) in to_ours() else "not the stock class"
        yield _own(name, model, f"{type(model).__module__}.{type(model).__qualname__}: {unlike}")
    elif found := class_obstacle(type(model)):
        yield _own(name, model, found)
    elif isinstance(model, FastGeneration):
        yield from _generating_lines(name, model)
    if ours:
        for part in HEADS:
            if part in model._modules:
                yield _own(_join(name, part), getattr(model, part), "transformers' own: a few numbers a row")
    if isinstance(model, stock.GPT2Model):
        tables = {part: model._modules[part] for part in ("wte", "wpe") if model._modules.get(part) is not None}
        reason = models.tables_obstacle(model)
        reason = reason if type(model) is models.GPT2Model else "called by transformers' forward"
        for part, table in tables.items():
            where = _join(name, part)
            yield _line(where, table, "embedding") if reason is None else _own(where, table, reason)
        yield _norm(_join(name, "ln_f"), model.ln_f, tables.get("wte"))


def _generating_lines(name: str, model: nn.Module) -> Iterator[Line]:
    """The lines of a model with a language-model head: generate, head and loss."""
    if (found := native_obstacle(model)) is None:
        head = model.config.hidden_size // model.config.num_attention_heads
        line = _line(name, model.transformer.wte, "decode_attention", "the native loop in generate", head=head)
        yield replace(line, module=type(model).__name__, backward=None)
    else:
        yield _own(name, model, f"generate runs transformers' loop: {found}")
    asked = isinstance(model, models.GPT2LMHeadModel) and model.fused_loss and model.training
    obstacle_to_fusion = models.fused_loss_obstacle(model) if asked else None
    if asked and obstacle_to_fusion is None:
        fused = "loss_function, where labels are given"
        line = _line(_join(name, "lm_head"), model.lm_head, "linear_cross_entropy", fused)
        yield line
        yield replace(line, name=_join(name, "loss_function"), module="function", fused="part of lm_head")
        return
    yield _leaf(_join(name, "lm_head"), model.lm_head, models.LINEAR, "linear")
    replaced = isinstance(model, models.GPT2LMHeadModel) and model.loss_function is not models.causal_lm_loss
    if replaced:
        other = "not switched" if model.loss_function is ForCausalLMLoss else "it is replaced"
        yield Line(_join(name, "loss_function"), "function", None, reason=other)
    else:
        line = _line(_join(name, "loss_function"), model.lm_head, "cross_entropy")
        reason = f"not fused with lm_head: {obstacle_to_fusion}" if obstacle_to_fusion else line.reason
        yield replace(line, module="function", reason=reason)


def _leaf(name: str, module: nn.Module, ours: tuple, op: str) -> Line:
    """The line of a module that is called as a module. Its hooks do not prevent its op, but another class does."""
    if isinstance(module, (PackedLinear, PackedHead)) and op == "linear":
        found = class_obstacle(type(module))
        return _line(name, module, op) if found is None else _own(name, module, found)
    if not isinstance(module, ours):
        return _own(name, module, f"{type(module).__module__}.{type(module).__qualname__} is not ours")
    # the op of a head replaces the call of the head; our other modules call their op themselves
    found = weight_obstacle(module, ours) if ours == models.LINEAR else class_obstacle(type(module))
    if found is None and not is_plain(getattr(module, "weight", None)):
        found = f"its weight is a {type(module.weight).__name__}"
    return _line(name, module, op) if found is None else _own(name, module, found)


def _norm(name: str, norm: nn.Module, beside: nn.Module | None) -> Line:
    """The line of a norm. ``beside`` is a module whose weight has the dtype of the norm's input."""
    if not isinstance(norm, blocks.LayerNorm):
        return _leaf(name, norm, (blocks.LayerNorm,), "layer_norm")
    found = class_obstacle(type(norm)) or blocks.norm_obstacle(norm.weight, norm.bias)
    given = WIDE if isinstance(beside, Packed) else getattr(getattr(beside, "weight", None), "dtype", None)
    if found is None and given not in (None, norm.weight.dtype) and not is_autocast(norm.weight):
        found = f"its weight is {dtype_name(norm.weight.dtype)}, what it is given {dtype_name(given)}"
    return _line(name, norm, "layer_norm") if found is None else _own(name, norm, found)


def _block_lines(name: str, block: nn.Module) -> Iterator[Line]:
    fused = isinstance(block, blocks.GPT2Block)
    if fused and (found := obstacle(block, (blocks.GPT2Block,))):
        yield _own(name, block, f"called as a module, with transformers' mask: {found}")
    for part, then in NORMS.items():
        if part in block._modules:
            parent, _, leaf = then.partition(".")
            beside = getattr(getattr(block, parent), leaf, None)
            yield _norm(_join(name, part), getattr(block, part), beside)
    for part in ("attn", "crossattention"):
        if part in block._modules:
            yield from _attention_lines(_join(name, part), getattr(block, part), fused)
    yield from _mlp_lines(_join(name, "mlp"), block.mlp, fused)


def _attention_lines(name: str, attn: nn.Module, fused: bool) -> Iterator[Line]:
    ours = isinstance(attn, blocks.GPT2Attention)
    found = blocks.attention_obstacle(attn, {}) if ours else "not ours"
    if found is not None:
        yield _own(name, attn, f"transformers' attention: {found}")
    else:
        skipped = obstacle(attn, (blocks.GPT2Attention,))
        dropout = attn.attn_dropout.p if attn.training else 0.0
        yield _line(name, attn, "attention", reason=skipped, head=attn.head_dim, dropout=dropout)
        fused = fused and skipped is None
    for part in ("c_attn", "q_attn"):
        if part in attn._modules:
            yield _leaf(_join(name, part), getattr(attn, part), (blocks.Conv1D,), "linear")
    parts = [attn._modules.get(part) for part in ("c_proj", "resid_dropout")]
    if None not in parts:
        yield _projection(_join(name, "c_proj"), *parts, fused and found is None)


def _projection(name: str, linear: nn.Module, dropout: nn.Module, fused: bool) -> Line:
    why = blocks.linear_obstacle(linear) or blocks.dropout_obstacle(dropout)
    if why is None and not fused:
        why = "its block or parent is called as a module"
    if why is None and is_autocast(linear.weight):
        why = "under autocast the residual stays in float32"
    if why is None:
        return _line(name, linear, "linear", "residual")
    line = _leaf(name, linear, (blocks.Conv1D,), "linear")
    return line if line.op is None else replace(line, reason=f"residual not fused: {why}")


def _mlp_lines(name: str, mlp: nn.Module, fused: bool) -> Iterator[Line]:
    if not isinstance(mlp, blocks.GPT2MLP):
        yield _own(name, mlp, f"{type(mlp).__module__}.{type(mlp).__qualname__} is not ours")
        return
    if found := obstacle(mlp, (blocks.GPT2MLP,)):
        yield _own(name, mlp, f"called as a module: {found}")
    act = mlp.act
    if (why := blocks.act_obstacle(mlp.act, mlp.c_fc)) is None:
        fc = _line(_join(name, "c_fc"), mlp.c_fc, "linear", blocks.ACTIVATIONS[type(act)])
        yield fc
    else:
        line = _leaf(_join(name, "c_fc"), mlp.c_fc, (blocks.Conv1D,), "linear")
        yield line if line.op is None else replace(line, reason=f"activation not fused: {why}")
    if why is None:
        yield Line(_join(name, "act"), type(act).__name__, fc.op, reason=None, fused="part of c_fc")
    elif isinstance(act, GELUS):
        yield replace(_line(_join(name, "act"), mlp, "gelu"), module=type(act).__name__)
    else:
        yield _own(_join(name, "act"), act, "no op of ours computes it")
    yield _projection(
        _join(name, "c_proj"), mlp.c_proj, mlp.dropout, fused and obstacle(mlp, (blocks.GPT2MLP,)) is None
    )


def _folded(lines: "Report") -> Iterator[tuple[str, str, str]]:
    """The rows for printing. Blocks in a row whose lines differ only in the number are joined: ``h.0-11.attn``."""
    groups: list[tuple[str, str, list[tuple[str, str, str]]]] = []  # (prefix, block number, rows)
    for line in lines:
        head, mark, tail = line.name.rpartition("h.") if ".h." in f".{line.name}" else (line.name, "", "")
        number, _, leaf = tail.partition(".")
        key = (head + mark, number) if mark and number.isdigit() else ("", "")
        row = (leaf if key[1] else line.name, line.module, line.text)
        if groups and groups[-1][:2] == key:
            groups[-1][2].append(row)
        else:
            groups.append((*key, [row]))
    index = 0
    while index < len(groups):
        prefix, first, rows = groups[index]
        last = first
        while first and index + 1 < len(groups) and groups[index + 1][0] == prefix and groups[index + 1][2] == rows:
            index += 1
            last = groups[index][1]
        span = first if first == last else f"{first}-{last}"
        for leaf, kind, text in rows:
            yield (f"{prefix}{span}.{leaf}" if first else leaf or "(model)", kind, text)
        index += 1
