"""Small random GPT-2s in three copies: transformers' (plain), ours, and transformers' in float64 (the truth)."""

import copy
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import GPT2Config
from transformers.cache_utils import Cache, EncoderDecoderCache

import gpt2fast
from gpt2fast.testing import assert_close_to_truth

CLASSES = (
    "GPT2Model",
    "GPT2LMHeadModel",
    "GPT2DoubleHeadsModel",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2ForQuestionAnswering",
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Runs on one thread: in tiny models a second thread costs more than it gains."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Trio(NamedTuple):
    plain: nn.Module
    ours: nn.Module
    truth: nn.Module

    def apply(self, change) -> "Trio":
        """Makes the same change to each of the three models."""
        for model in self:
            change(model)
        return self


def config(**changes) -> GPT2Config:
    sizes = dict(n_layer=2, n_head=4, n_embd=64, vocab_size=211, n_positions=48, bos_token_id=0, eos_token_id=1)
    return GPT2Config(**(sizes | dict(initializer_range=0.15) | changes))


def trio(kind: str = "GPT2LMHeadModel", dtype: torch.dtype = torch.float32, implementation=None, **changes) -> Trio:
    torch.manual_seed(7)
    made = config(**changes)
    if implementation is not None:
        made._attn_implementation = implementation
    plain = getattr(transformers, kind)(made).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.dim() == 1:  # biases start at 0 and norms at 1, which would hide errors
                parameter.add_(torch.randn_like(parameter) * 0.1)
    plain = plain.to(dtype)
    return Trio(plain, gpt2fast.optimize(copy.deepcopy(plain)), copy.deepcopy(plain).double())


def tokens(B: int = 3, T: int = 9, vocabulary: int = 211, seed: int = 0) -> Tensor:
    return torch.randint(2, vocabulary, (B, T), generator=torch.Generator().manual_seed(seed))


def padded(B: int = 3, T: int = 9, left: bool = True) -> Tensor:
    """An attention mask (B, T) int64 in which row b has 2 b columns of padding."""
    column, row = torch.arange(T), torch.arange(B)[:, None]
    return (column >= 2 * row).long() if left else (column < T - 2 * row).long()


def widened(value: Any) -> Any:
    """Converts floating-point tensors to float64, also inside containers."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: widened(item) for key, item in value.items()}
    return copy.deepcopy(value) if isinstance(value, Cache) else value


def flat(value: Any, name: str = "output") -> list[tuple[str, Tensor]]:
    """Every tensor of an output, with its path. The tensors of a cache are its keys and values."""
    if isinstance(value, Tensor):
        return [(name, value)]
    if isinstance(value, EncoderDecoderCache):
        value = {"self": value.self_attention_cache, "cross": value.cross_attention_cache}
    if isinstance(value, Cache):
        value = [(layer.keys, layer.values) for layer in value.layers]
    if isinstance(value, dict):
        return [pair for key, item in value.items() for pair in flat(item, f"{name}.{key}")]
    if isinstance(value, (list, tuple)):
        return [pair for i, item in enumerate(value) for pair in flat(item, f"{name}[{i}]")]
    return []


def same(models: Trio, *args, grad: bool = False, **kwargs) -> Any:
    """Calls all three models and checks that they return tensors in the same places and that each keeps the parity
    rule. Returns our output."""
    outputs = []
    for model in models:
        wide = model is models.truth
        with torch.set_grad_enabled(grad):
            outputs.append(model(*(map(widened, args) if wide else args), **(widened(kwargs) if wide else kwargs)))
    compare(*outputs)
    return outputs[1]


def same_losses(models: Trio, ids: Tensor, **kwargs) -> None:
    """Checks that the losses of 16 prompts (``ids`` rolled) keep the parity rule as one vector. The error of a single
    number would be chance."""
    with torch.no_grad():
        losses = [torch.stack([model(ids.roll(i, -1), **kwargs).loss for i in range(16)]) for model in models]
    compare(*losses)


def generates_the_same(models: Trio, **options) -> Tensor:
    """Checks that our greedy texts are transformers', for a batch with padding and for one row. Returns the batch's."""
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0) | options
    for given in (dict(input_ids=tokens()[:1]), dict(input_ids=tokens(), attention_mask=padded())):
        found = []
        for model in models[:2]:
            torch.manual_seed(2)
            found.append(model.generate(**given, **options))
        assert torch.equal(*found), f"transformers: {found[0].tolist()}, ours: {found[1].tolist()}"
    return found[1]


def compare(plain: Any, ours: Any, truth: Any) -> None:
    """Checks the parity rule for every tensor except single numbers; same_losses checks those."""
    plain, ours, truth = flat(plain), flat(ours), flat(truth)
    assert [name for name, _ in ours] == [name for name, _ in plain]
    assert plain
    for (name, p), (_, o), (_, t) in zip(plain, ours, truth):
        assert o.dtype == p.dtype, f"{name}: dtype {o.dtype}, expected {p.dtype}"
        if p.dim() > 0:
            assert_close_to_truth(o.detach(), p.detach(), t.detach().double(), name)


def same_gradients(models: Trio) -> None:
    """Checks after a backward pass through each model that the gradients keep the parity rule. The weight and the bias
    of a module count as one."""
    gradients: list[dict[str, list[Tensor]]] = []
    for model in models:
        found: dict[str, list[Tensor]] = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found.setdefault(name.rpartition(".")[0], []).append(parameter.grad.flatten())
        gradients.append(found)
    plain, ours, truth = gradients
    assert plain and ours.keys() == plain.keys()
    for name in plain:
        p, o, t = (torch.cat(each[name]) for each in (plain, ours, truth))
        assert_close_to_truth(o, p, t, f"gradient of {name}")
