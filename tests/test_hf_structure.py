"""Models changed by hand: generate and forward neither raise nor differ from transformers', natively or not."""

import functools

import pytest
import torch
from hf_models import generates_the_same, one_thread, padded, same, tokens, trio  # noqa: F401
from torch import nn
from transformers import GenerationMixin, activations, pytorch_utils
from transformers.models.gpt2 import modeling_gpt2 as stock
from transformers.pytorch_utils import Conv1D

import gpt2fast
from gpt2fast.hf import blocks
from gpt2fast.hf.generation import native_obstacle

IDS = tokens()
GREEDY = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(0.15).to(dtype))


def with_heads(model, heads: int, head_dim: int) -> None:
    """Gives layer 0 an attention with so many heads of that size, in a model of 4 heads of 16."""
    attn, width, dtype = model.transformer.h[0].attn, heads * head_dim, model.dtype
    attn.num_heads, attn.head_dim, attn.split_size = heads, head_dim, width
    attn.scaling = head_dim**-0.5
    attn.c_attn.weight, attn.c_attn.nf = normal(64, 3 * width, dtype=dtype), 3 * width
    attn.c_attn.bias = normal(3 * width, dtype=dtype)
    attn.c_proj.weight, attn.c_proj.nx = normal(width, 64, dtype=dtype), width


def with_inner(model, inner: int) -> None:
    mlp, dtype = model.transformer.h[0].mlp, model.dtype
    mlp.c_fc, mlp.c_proj = Conv1D(inner, 64), Conv1D(64, inner)
    mlp.c_fc.weight, mlp.c_proj.weight = normal(64, inner, dtype=dtype), normal(inner, 64, dtype=dtype, seed=1)
    mlp.to(dtype)


def with_positions(model, count: int) -> None:
    model.transformer.wpe = nn.Embedding(count, 64)
    model.transformer.wpe.weight = normal(count, 64, dtype=model.dtype)


def with_head(model, head: nn.Module) -> None:
    for index, parameter in enumerate(head.parameters()):
        parameter.data = normal(*parameter.shape, dtype=model.dtype, seed=index).data
    model.lm_head = head


def share_layer(model) -> None:
    first, second = model.transformer.h
    second.attn.c_attn.weight, second.mlp.c_fc = first.attn.c_attn.weight, first.mlp.c_fc


def without_affine(model) -> None:
    model.transformer.h[1].ln_2 = nn.LayerNorm(64, elementwise_affine=False)


def change_config(**changes):
    """Changes after construction, when transformers' modules have read these values already."""
    return lambda model: [setattr(model.config, name, value) for name, value in changes.items()]


def set_in(part: str, **attributes):
    return lambda model: [setattr(model.get_submodule(part), name, value) for name, value in attributes.items()]


# change -> what the report says about generate; None if the native loop runs
CHANGES = {
    "a dropped layer": (lambda m: m.transformer.h.__delitem__(1), "missing: h.1"),
    "a slice of the layers": (lambda m: setattr(m.transformer, "h", m.transformer.h[:1]), "missing: h.1"),
    "layers turned round": (lambda m: setattr(m.transformer, "h", nn.ModuleList(m.transformer.h[::-1])), "layer"),
    "a pruned head": (lambda m: with_heads(m, 3, 16), "heads, scaling or layer"),
    "an extra head": (lambda m: with_heads(m, 5, 16), "heads, scaling or layer"),
    "smaller heads": (lambda m: with_heads(m, 4, 8), "heads, scaling or layer"),
    "the same width in other heads": (set_in("transformer.h.0.attn", head_dim=8), "heads, scaling or layer"),
    "another scaling": (set_in("transformer.h.1.attn", scaling=0.5), "heads, scaling or layer"),
    "another inner width": (lambda m: with_inner(m, 100), "c_fc"),
    "more positions": (lambda m: with_positions(m, 60), "wpe.weight must be"),
    "shared parameters": (share_layer, None),
    "a replaced parameter": (
        lambda m: setattr(m.transformer.ln_f, "weight", normal(64, dtype=m.dtype)), None,
    ),
    "a replaced module": (lambda m: with_inner(m, 256), None),
    "a head of its own": (lambda m: with_head(m, nn.Linear(64, 211, bias=False)), None),
    "a head with a bias": (lambda m: with_head(m, nn.Linear(64, 211)), "surplus: lm_head.bias"),
    "a head of two layers": (
        lambda m: with_head(m, nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 211))), "lm_head",
    ),
    "a norm without weights": (without_affine, "missing: h.1.ln_2"),
    "another epsilon": (set_in("transformer.h.0.ln_2", eps=0.5), "eps is not the config's"),
    "another activation": (set_in("transformer.h.0.mlp", act=activations.GELUActivation()), "is not the config's"),
    "an identity for a dropout": (set_in("transformer.h.0.attn", resid_dropout=nn.Identity()), "Identity"),
    "max_norm": (set_in("transformer.wte", max_norm=0.9), "max_norm"),
    "max_norm of positions": (set_in("transformer.wpe", max_norm=0.9), "max_norm"),
    "padding_idx": (set_in("transformer.wte", padding_idx=5), None),
    "an unused parameter": (
        lambda m: setattr(m.transformer.h[0], "gate", normal(3, dtype=m.dtype)), "surplus: h.0.gate",
    ),
    "an unused module": (lambda m: setattr(m, "adapter", nn.Linear(2, 2)), "no part of a GPT-2"),
    "a config of another epsilon": (change_config(layer_norm_epsilon=0.3), "eps is not the config's"),
    "a config of another activation": (change_config(activation_function="relu"), "is not the config's"),
    "a config of other scales": (change_config(scale_attn_by_inverse_layer_idx=True), "heads, scaling or layer"),
    "a config that says untied": (change_config(tie_word_embeddings=False), None),
    "a config that is none": (change_config(n_inner=-3), "n_inner must be"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_changed_structure(name):
    change, reason = CHANGES[name]
    models = trio()
    generates_the_same(models)  # the native model with the old weights exists
    models.apply(change)
    generates_the_same(models)
    found = native_obstacle(models.ours)
    assert found is None if reason is None else reason in found, found
    assert reason is None or reason in gpt2fast.report(models.ours)[""].reason
    same(models, IDS, attention_mask=padded())


def test_tied_after_having_been_untied():
    models = trio(tie_word_embeddings=False)
    before = generates_the_same(models)
    models.apply(lambda model: setattr(model.lm_head, "weight", model.transformer.wte.weight))
    assert not torch.equal(generates_the_same(models), before)


def test_norms_kept_in_float32():
    models = trio(dtype=torch.bfloat16)
    for model in models[:2]:
        model.transformer.ln_f.float()
    same(models, IDS)
    assert native_obstacle(models.ours) == "its parameters differ in dtype or device"
    out = models.ours.generate(IDS, **GREEDY, eos_token_id=None)
    with torch.no_grad():
        assert torch.equal(models.ours(out).logits[:, 8:-1].argmax(-1), out[:, 9:])


@pytest.mark.parametrize("part", ("", "transformer.drop", "transformer.h.0.attn.resid_dropout", "transformer.h.1.mlp"))
def test_dropout_in_generate(part):
    """Monte Carlo dropout: the model or a part of it is in training mode, and the draws are those of transformers."""
    models = trio(resid_pdrop=0.4, embd_pdrop=0.4, attn_pdrop=0.0)
    calm = generates_the_same(models)
    models.apply(lambda model: model.get_submodule(part).train())
    assert not torch.equal(generates_the_same(models), calm)
    assert "dropout is active" in gpt2fast.report(models.ours)[""].reason


def test_attention_dropout_in_generate():
    """The draws differ from those of transformers, but they are random draws."""
    models = trio(attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0)
    calm = generates_the_same(models)
    ours = models.ours.train()
    drawn = [ours.generate(IDS, attention_mask=padded(), **GREEDY) for _ in range(2)]
    assert not torch.equal(drawn[0], calm) and not torch.equal(*drawn)
    models.apply(lambda model: model.train())
    for model in models:
        for block in model.transformer.h:
            block.attn.attn_dropout.p = 0.0
    assert torch.equal(generates_the_same(models), calm)


FORWARDS = {
    "transformers' block": stock.GPT2Block,
    "transformers' attention": stock.GPT2Attention,
    "transformers' MLP": stock.GPT2MLP,
    "transformers' Conv1D": pytorch_utils.Conv1D,
    "transformers' activation": activations.NewGELUActivation,
    "torch's layer norm": nn.LayerNorm,
    "torch's dropout": nn.Dropout,
    "torch's embedding": nn.Embedding,
    "torch's linear": nn.Linear,
    "transformers' GPT2Model": stock.GPT2Model,
    "transformers' GPT2LMHeadModel": stock.GPT2LMHeadModel,
}
OURS = (
    blocks.GPT2Block, blocks.GPT2Attention, blocks.GPT2MLP, blocks.Conv1D, blocks.LayerNorm,
    blocks.NewGELUActivation, gpt2fast.GPT2Model, gpt2fast.GPT2LMHeadModel,
)  # fmt: skip


def scaled(output):
    """1.25 times what a forward returned, whatever its type."""
    if isinstance(output, torch.Tensor):
        return output * 1.25
    if isinstance(output, tuple):
        return (output[0] * 1.25, *output[1:])
    name = "logits" if "logits" in output else "last_hidden_state"
    output[name] = output[name] * 1.25
    return output


def replace_forward(monkeypatch, kind: type) -> list[type]:
    forward, calls = kind.forward, []

    @functools.wraps(forward)  # generate reads the signature
    def replaced(self, *args, **kwargs):
        calls.append(type(self))
        return scaled(forward(self, *args, **kwargs))

    monkeypatch.setattr(kind, "forward", replaced)
    return calls


@pytest.mark.parametrize("name", FORWARDS)
def test_a_forward_replaced_in_its_class_is_called(name, monkeypatch):
    models = trio()
    before = models.ours(IDS, attention_mask=padded()).logits
    generates_the_same(models)
    calls = replace_forward(monkeypatch, FORWARDS[name])
    after = same(models, IDS, attention_mask=padded()).logits
    assert not torch.allclose(before, after)
    counts = []
    for model in models[:2]:
        calls.clear()
        model.generate(IDS, attention_mask=padded(), **GREEDY)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0
    generates_the_same(models)


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_a_forward_replaced_in_our_class_is_called(kind, monkeypatch):
    ours = trio().ours
    before = ours(IDS).logits
    calls = replace_forward(monkeypatch, kind)
    assert not torch.allclose(ours(IDS).logits, before) and calls
    calls.clear()
    ours.generate(IDS, attention_mask=padded(), **GREEDY)
    assert calls and "forward of" in native_obstacle(ours)


@pytest.mark.parametrize("kind", (stock.GPT2LMHeadModel, GenerationMixin), ids=lambda kind: kind.__name__)
def test_a_step_of_generate_replaced_in_its_class_is_called(kind, monkeypatch):
    models, calls = trio(), []
    before = generates_the_same(models)
    prepare = GenerationMixin.prepare_inputs_for_generation

    def replaced(self, input_ids, *args, **kwargs):
        calls.append(1)
        return prepare(self, input_ids.flip(0), *args, **kwargs)

    monkeypatch.setattr(kind, "prepare_inputs_for_generation", replaced, raising=False)
    assert not torch.equal(generates_the_same(models), before) and calls
    assert "prepare_inputs_for_generation is replaced" in gpt2fast.report(models.ours)[""].reason
