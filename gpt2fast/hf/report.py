"""report(model): module by module which op runs, on what, what is fused into it, and where ours does not run, why."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.models.gpt2 import modeling_gpt2 as stock

from .. import backends
from . import blocks, models
from .checks import embedding_obstacle, obstacle, weight_obstacle
from .convert import _roots, to_ours
from .generation import native_obstacle


@dataclass(frozen=True)
class Line:
    """One module (or step) of a model. ``op`` is None where PyTorch's or another's code runs, ``reason`` says why."""

    name: str
    module: str
    op: str | None
    backend: str | None = None
    fused: str | None = None
    reason: str | None = None

    @property
    def text(self) -> str:
        does = f"gpt2fast::{self.op}" if self.op else "module's own code"
        does += f" + {self.fused}" if self.fused else ""
        does += f" on {self.backend}" if self.backend else ""
        return does + (f"; {self.reason}" if self.reason else "")


class Report(tuple):
    """The lines of a report, by name ``report["transformer.h.0.attn"]``; printed with equal blocks folded."""

    def __getitem__(self, key):
        if isinstance(key, str):
            found = [line for line in self if line.name == key]
            if not found:
                raise KeyError(key)
            return found[0]
        return super().__getitem__(key)

    @property
    def reasons(self) -> dict[str, str]:
        """By module name why an op of ours, or a fusion, is not used there; empty where all is."""
        return {line.name: line.reason for line in self if line.reason}

    def to_dict(self) -> list[dict]:
        return [asdict(line) for line in self]

    def __str__(self) -> str:
        rows = list(_folded(self))
        widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
        return "\n".join(f"{name:{widths[0]}}  {kind:{widths[1]}}  {text}" for name, kind, text in rows)

    __repr__ = __str__


def report(model: nn.Module) -> Report:
    """What a call of ``model`` as it stands now would run: hooks, adapters, training mode and dtype are looked at.

    Raises TypeError where there is no GPT-2 in it.
    """
    _roots(model)
    lines: list[Line] = []
    for name, module in model.named_modules():
        if isinstance(module, stock.GPT2PreTrainedModel):
            lines += _model_lines(name, module)
        elif isinstance(module, stock.GPT2Block):
            lines += _block_lines(name, module)
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    lines.sort(key=lambda line: order.get(line.name, len(order)))
    return Report(lines)


def _line(name: str, module: nn.Module, op: str, fused: str | None = None, reason: str | None = None, head=64) -> Line:
    weight = next(module.parameters(), None)
    backend = None
    if weight is not None:
        backend, why = _backend(op, weight, head)
        reason = reason or why
    return Line(name, type(module).__name__, op, backend, fused, reason)


def _backend(op: str, weight, head: int) -> tuple[str, str | None]:
    if weight.device.type != "cpu":
        return "reference", f"no kernel for device {weight.device.type}"
    if why := backends.uncovered(op, weight.dtype, head):
        return "reference", why
    return f"cpu, {backends.isa()}", None


def _own(name: str, module: nn.Module, reason: str) -> Line:
    return Line(name, type(module).__name__, None, reason=reason)


def _join(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part


def _model_lines(name: str, model: nn.Module) -> Iterator[Line]:
    if type(model) not in to_ours().values():
        unlike = "gpt2fast.optimize has not switched it" if type(model) in to_ours() else "not the stock class"
        yield _own(name, model, f"{type(model).__module__}.{type(model).__qualname__}: {unlike}")
    elif isinstance(model, models.GPT2LMHeadModel):
        if (found := native_obstacle(model)) is None:
            yield Line(name, type(model).__name__, "decode_attention", fused="the native loop in generate")
        else:
            yield _own(name, model, f"generate runs transformers' loop: {found}")
        yield _leaf(_join(name, "lm_head"), model.lm_head, models.LINEAR, "linear")
        if model.loss_function is models.causal_lm_loss:
            yield replace(_line(_join(name, "loss_function"), model.lm_head, "cross_entropy"), module="function")
        else:
            other = "not switched" if model.loss_function is ForCausalLMLoss else "it is replaced"
            yield Line(_join(name, "loss_function"), "function", None, reason=other)
    if isinstance(model, stock.GPT2Model):
        for part in ("wte", "wpe"):
            table = getattr(model, part)
            found = embedding_obstacle(table)
            found = found if type(model) is models.GPT2Model else "called by transformers' forward"
            yield _own(_join(name, part), table, found) if found else _line(_join(name, part), table, "embedding")
        yield _leaf(_join(name, "ln_f"), model.ln_f, (blocks.LayerNorm,), "layer_norm")


def _leaf(name: str, module: nn.Module, ours: tuple, op: str, fused: str | None = None) -> Line:
    """A module that is called as such: hooks do not stand in the way of its op, another class does."""
    if not isinstance(module, ours):
        return _own(name, module, f"{type(module).__module__}.{type(module).__qualname__} is not ours")
    if ours == models.LINEAR and (found := weight_obstacle(module, ours)):
        return _own(name, module, found)
    return _line(name, module, op, fused)


def _block_lines(name: str, block: nn.Module) -> Iterator[Line]:
    fused = isinstance(block, blocks.GPT2Block)
    if fused and (found := obstacle(block, (blocks.GPT2Block,))):
        yield _own(name, block, f"called as a module, with transformers' mask: {found}")
    for part in ("ln_1", "ln_2", "ln_cross_attn"):
        if part in block._modules:
            yield _leaf(_join(name, part), getattr(block, part), (blocks.LayerNorm,), "layer_norm")
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
        yield Line(name, type(attn).__name__, "attention", *_backend_of(attn), reason=skipped or _backend_reason(attn))
        fused = fused and skipped is None
    for part in ("c_attn", "q_attn"):
        if part in attn._modules:
            yield _leaf(_join(name, part), getattr(attn, part), (blocks.Conv1D,), "linear")
    yield _projection(_join(name, "c_proj"), attn.c_proj, attn.resid_dropout, fused and found is None)


def _backend_of(attn) -> tuple[str | None]:
    weight = next(attn.parameters(), None)
    return (None if weight is None else _backend("attention", weight, attn.head_dim)[0],)


def _backend_reason(attn) -> str | None:
    weight = next(attn.parameters(), None)
    return None if weight is None else _backend("attention", weight, attn.head_dim)[1]


def _projection(name: str, linear: nn.Module, dropout: nn.Module, fused: bool) -> Line:
    if not isinstance(linear, blocks.Conv1D):
        return _leaf(name, linear, (blocks.Conv1D,), "linear")
    why = weight_obstacle(linear, blocks.CONV1D) or obstacle(dropout, blocks.DROPOUT)
    if why is None and dropout.training and dropout.p > 0:
        why = "dropout comes between product and residual"
    if why is None and not fused:
        why = "its block or parent is called as a module"
    return _line(name, linear, "linear", None if why else "residual", f"residual not fused: {why}" if why else None)


def _mlp_lines(name: str, mlp: nn.Module, fused: bool) -> Iterator[Line]:
    if not isinstance(mlp, blocks.GPT2MLP):
        yield _own(name, mlp, f"{type(mlp).__module__}.{type(mlp).__qualname__} is not ours")
        return
    if found := obstacle(mlp, (blocks.GPT2MLP,)):
        yield _own(name, mlp, f"called as a module: {found}")
    act = mlp.act
    form = blocks.ACTIVATIONS.get(type(act))
    why = "its activation is no GELU" if form is None else obstacle(act, (type(act),))
    why = why or weight_obstacle(mlp.c_fc, blocks.CONV1D)
    line = _leaf(_join(name, "c_fc"), mlp.c_fc, (blocks.Conv1D,), "linear", None if why else form)
    if why is not None and line.op is not None:
        line = replace(line, reason=f"activation not fused: {why}")
    yield line
    if why is None:
        yield Line(_join(name, "act"), type(act).__name__, "linear", reason=None, fused="part of c_fc")
    elif form and isinstance(act, tuple(kind for kind in blocks.ACTIVATIONS if kind.__module__ == blocks.__name__)):
        yield Line(_join(name, "act"), type(act).__name__, "gelu")
    else:
        yield _own(_join(name, "act"), act, "no op of ours computes it")
    yield _projection(
        _join(name, "c_proj"), mlp.c_proj, mlp.dropout, fused and obstacle(mlp, (blocks.GPT2MLP,)) is None
    )


def _folded(lines: "Report") -> Iterator[tuple[str, str, str]]:
    """Rows for printing; runs of blocks whose lines are equal but for their number become one: ``h.0-11.attn``."""
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
