"""A step is skipped only if the model is in the known state. Anything else there is obeyed, or refused by name."""

import copy

import pytest
import torch
from hf_models import trio
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.models.gpt2 import modeling_gpt2 as stock

import gpt2fast

IDS = torch.tensor([[5, 9, 3, 17, 2, 8, 30, 4]])


def model(**options):
    torch.manual_seed(0)
    sizes = dict(vocab_size=101, n_positions=64, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2)
    return GPT2LMHeadModel(GPT2Config(**sizes | options)).eval()


def pair(change=None):
    """A stock model and an optimized copy, both changed."""
    plain = model()
    ours = gpt2fast.optimize(copy.deepcopy(plain))
    for one in (plain, ours):
        if change is not None:
            change(one)
    return plain, ours


def function_for_module(m):
    for block in m.transformer.h:
        del block.mlp.act
        block.mlp.act = torch.tanh


CHANGES = {
    "a function for a module": function_for_module,
    "a model that is not causal": lambda m: setattr(m.config, "is_causal", False),
    "a sliding window": lambda m: setattr(m.config, "sliding_window", 3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_generates_what_the_stock_model_does(name):
    plain, ours = pair(CHANGES[name])
    options = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(IDS, **options), plain.generate(IDS, **options))
    torch.testing.assert_close(ours(IDS).logits, plain(IDS).logits)
    unchanged = model().generate(IDS, **options)
    assert not torch.equal(plain.generate(IDS, **options), unchanged), "the change must show"


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize(
    "change, said",
    [
        (CHANGES["a function for a module"], "missing: h.0.mlp.act"),
        (CHANGES["a model that is not causal"], "is_causal must be true, got False"),
        (CHANGES["a sliding window"], "sliding_window must be null, got 3"),
        (lambda m: setattr(m.transformer.h[1].mlp, "act", None), "missing: h.1.mlp.act"),
        (lambda m: setattr(m.transformer.h[1].mlp, "act", nn.Tanh()), "h.1.mlp.act: torch.Tanh is not the stock class"),
        (lambda m: m.transformer.h[2].register_forward_hook(lambda *a: None), "h.2: it has a forward hook"),
        (lambda m: setattr(m.transformer.h[0].attn, "is_causal", False), "is_causal was changed"),
        (lambda m: setattr(m.transformer.h[0].ln_1, "eps", 1.0), "its eps is not the config's"),
        (lambda m: setattr(m, "forward", lambda x: x), "its forward is replaced"),
    ],
)
def test_the_native_model_is_made_of_a_stock_model_only(change, said, optimized):
    changed = model()
    changed = gpt2fast.optimize(changed) if optimized else changed
    change(changed)
    with pytest.raises(ValueError) as raised:
        gpt2fast.GPT2.from_transformers(changed)
    assert said in str(raised.value)


@pytest.mark.parametrize("key, value", [("sliding_window", 3), ("is_causal", False), ("attention_chunk_size", 8)])
def test_a_checkpoint_whose_config_asks_for_something_else_is_refused(tmp_path, key, value):
    changed = model()
    setattr(changed.config, key, value)
    changed.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"gpt2fast.Config: {key} must be .*, got {value}"):
        gpt2fast.GPT2.from_pretrained(tmp_path)


def test_a_mask_registered_as_sdpa_is_obeyed():
    plain, ours = pair()
    before = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    unmasked = plain(IDS).logits

    def last_three(*args, **kwargs):
        T = IDS.shape[1]
        key = torch.arange(T)
        return ((key <= key[:, None]) & (key > key[:, None] - 3))[None, None]

    AttentionMaskInterface.register("sdpa", last_three)
    try:
        found, expected = ours(IDS).logits, plain(IDS).logits
        tokens = [m.generate(IDS, max_new_tokens=1, do_sample=False, pad_token_id=0) for m in (ours, plain)]
    finally:
        AttentionMaskInterface.register("sdpa", before)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(expected, unmasked) and torch.equal(*tokens)
    torch.testing.assert_close(ours(IDS).logits, unmasked)


def test_a_replaced_maker_of_masks_is_obeyed(monkeypatch):
    plain, ours = pair()
    T, causal = IDS.shape[1], plain(IDS).logits
    monkeypatch.setattr(stock, "create_causal_mask", lambda **kwargs: torch.ones(1, 1, T, T, dtype=torch.bool))
    torch.testing.assert_close(ours(IDS).logits, plain(IDS).logits)
    assert not torch.allclose(plain(IDS).logits, causal)


def test_whole_numbers_are_no_4d_mask():
    plain, ours = pair()
    mask = torch.ones(8, 8).tril()[None, None].long()
    with pytest.raises(RuntimeError, match="attn_mask dtype"):
        plain(IDS, attention_mask=mask)
    with pytest.raises(ValueError, match="4D attention_mask must be bool, float32 .*, got torch.int64"):
        ours(IDS, attention_mask=mask)
    for fine in (mask.bool(), torch.where(mask == 1, 0.0, -torch.inf)):
        torch.testing.assert_close(ours(IDS, attention_mask=fine).logits, plain(IDS, attention_mask=fine).logits)


@pytest.mark.parametrize("hidden", [-1e30, -1e10])
def test_a_large_finite_mask_hides_and_a_row_that_sees_nothing_stays_finite(hidden):
    plain, ours = pair()
    ids = IDS.repeat(2, 1)
    mask = torch.full((2, 1, 8, 8), hidden).triu(1)
    mask[1, :, :, :3] = hidden  # left padding: to the first queries of the row, all keys are hidden
    found, expected = (m(ids, attention_mask=mask).logits for m in (ours, plain))
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected)


def test_a_prefix_under_gradient_checkpointing_is_refused():
    models = trio()
    ours = models.ours.train()
    past = ours(IDS[:, :4], use_cache=True).past_key_values
    ours.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="past_key_values must be empty under gradient checkpointing.*got one of 4"):
        ours(IDS[:, 4:], past_key_values=past, labels=IDS[:, 4:])
    assert ours(IDS, labels=IDS).loss.isfinite()
