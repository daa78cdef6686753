"""Every argument and configuration switch of transformers' GPT-2: all that our model returns keeps the parity rule."""

import pytest
import torch
from hf_models import CLASSES, compare, one_thread, padded, same, same_gradients, same_losses, tokens, trio  # noqa: F401
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

IDS = tokens()
LABELS = torch.where(torch.arange(9) % 4 == 1, -100, IDS)
TREE = torch.rand(3, 1, 9, 9, generator=torch.Generator().manual_seed(1)) < 0.6
TREE |= torch.eye(9, dtype=torch.bool)
EMBEDS = torch.randn(3, 9, 64, generator=torch.Generator().manual_seed(2))
ARGUMENTS = {
    "nothing": dict(),
    "left padding": dict(attention_mask=padded()),
    "right padding": dict(attention_mask=padded(left=False)),
    "holes": dict(attention_mask=(IDS % 3 > 0).long()),
    "all ones": dict(attention_mask=torch.ones(3, 9, dtype=torch.bool)),
    "4D bool mask": dict(attention_mask=TREE),
    "4D added mask": dict(attention_mask=torch.zeros(()).masked_fill(~TREE, -torch.inf)),
    "4D added mask by head": dict(attention_mask=torch.randn(3, 4, 9, 9, generator=torch.Generator().manual_seed(3))),
    "positions": dict(position_ids=torch.arange(9).flip(0)[None]),
    "positions by row": dict(position_ids=(IDS % 48)),
    "packed sequences": dict(position_ids=torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]]), use_cache=False),
    "positions in order, no cache": dict(position_ids=torch.arange(4, 13)[None].expand(3, 9), use_cache=False),
    "token types": dict(token_type_ids=IDS.flip(1)),
    "no cache": dict(use_cache=False),
    "hidden states": dict(output_hidden_states=True),
    "hidden states by number": dict(output_hidden_states=[0, -1]),
    "attentions": dict(output_attentions=True),
    "a tuple": dict(return_dict=False),
    "bidirectional": dict(is_causal=False),
}
LOSSES = {
    "labels": dict(labels=IDS),
    "labels, some ignored": dict(labels=LABELS),
    "num_items_in_batch": dict(labels=LABELS, num_items_in_batch=torch.tensor(11)),
    "num_items_in_batch as a number": dict(labels=LABELS, num_items_in_batch=11),
    "shift_labels": dict(labels=IDS, shift_labels=LABELS.flip(1)),
    "ignore_index": dict(labels=IDS, ignore_index=int(IDS[0, 1])),
}
HEADS = {
    "last logits": dict(logits_to_keep=1),
    "last three logits": dict(logits_to_keep=3),
    "some logits": dict(logits_to_keep=torch.tensor([0, 4, 8])),
    "some logits by row": dict(logits_to_keep=torch.tensor([[0], [4], [8]])),
}
CONFIGS = {
    "no scale": dict(scale_attn_weights=False),
    "scale by layer": dict(scale_attn_by_inverse_layer_idx=True),
    "untied": dict(tie_word_embeddings=False),
    "n_inner": dict(n_inner=100),
    "odd sizes": dict(n_embd=66, n_head=2, vocab_size=211),
    "one head": dict(n_head=1),
    "epsilon": dict(layer_norm_epsilon=1e-2),
    "eager": dict(implementation="eager"),
    "eager, upcast and reordered": dict(implementation="eager", reorder_and_upcast_attn=True),
    "upcast, which sdpa ignores": dict(reorder_and_upcast_attn=True),
} | {
    name: dict(activation_function=name)
    for name in ("relu", "gelu", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "quick_gelu", "silu", "tanh")
}


@pytest.fixture(scope="module")
def language_models():
    return {dtype: trio(dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", ARGUMENTS | HEADS)
def test_argument(language_models, name, dtype):
    arguments = {
        key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in (ARGUMENTS | HEADS)[name].items()
    }
    same(language_models[dtype], IDS, **arguments)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_loss(language_models, name, dtype):
    same_losses(language_models[dtype], IDS, **LOSSES[name])


def test_inputs_embeds(language_models):
    for mask in (None, padded()):
        same(language_models[torch.float32], inputs_embeds=EMBEDS, attention_mask=mask, token_type_ids=IDS)


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name):
    models = trio(**CONFIGS[name])
    for block in models.truth.transformer.h:
        block.attn.reorder_and_upcast_attn = False  # it refuses float64, where the order of products is the same
    same(models, IDS, attention_mask=padded())
    found = same(models, IDS, output_attentions=True)
    eager = CONFIGS[name].get("implementation") == "eager"
    assert len(found.attentions) == (2 if eager else 0)  # transformers' sdpa gives none either


@pytest.mark.parametrize("kind", CLASSES)
def test_class(kind):
    """Outputs, losses and gradients, over so many rows that the error of one number in each row is not chance."""
    ids = tokens(32, 9)
    arguments = {
        "GPT2Model": dict(),
        "GPT2LMHeadModel": dict(labels=ids),
        "GPT2DoubleHeadsModel": dict(mc_token_ids=ids[:, :2] % 9, labels=ids[:, None].expand(-1, 2, -1)),
        "GPT2ForSequenceClassification": dict(labels=ids[:, 0] % 2),
        "GPT2ForTokenClassification": dict(labels=ids % 2),
        "GPT2ForQuestionAnswering": dict(start_positions=ids[:, 0] % 9, end_positions=ids[:, 1] % 9),
    }[kind]
    if kind == "GPT2DoubleHeadsModel":
        arguments["mc_labels"] = ids[:, 0] % 2
        ids = torch.stack([ids, ids.flip(1)], 1)
    models = trio(kind, pad_token_id=0, summary_first_dropout=0.0)
    found = same(models, ids, **arguments)
    assert type(found) is type(models.plain(ids, **arguments))
    if kind != "GPT2Model":
        same_losses(models, ids, **arguments)
    for model in models:
        out = model(ids, **arguments)
        loss = out.last_hidden_state.square().mean() if kind == "GPT2Model" else out.loss
        (loss + (out.mc_loss if kind == "GPT2DoubleHeadsModel" else 0)).backward()
    same_gradients(models)


@pytest.mark.parametrize("mask", (None, padded(), padded(left=False)), ids=("no mask", "left", "right"))
@pytest.mark.parametrize("make", (DynamicCache, StaticCache, EncoderDecoderCache), ids=lambda c: c.__name__)
def test_cache(language_models, make, mask):
    """Prefill, one token, three tokens: outputs and everything in the cache."""
    models = language_models[torch.float32]

    def cache(model):
        if make is StaticCache:
            return StaticCache(config=model.config, max_cache_len=20)
        if make is EncoderDecoderCache:
            return EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
        return DynamicCache(config=model.config)

    caches = [cache(model) for model in models]
    more = tokens(3, 4, seed=5)
    begin = 0
    for T in (9, 1, 3):
        ids = IDS if begin == 0 else more[:, begin - 9 : begin - 9 + T]
        whole = None
        if mask is not None:
            whole = torch.cat([mask, torch.ones(3, begin + T - 9, dtype=torch.long)], 1) if begin else mask
        with torch.no_grad():
            compare(*(m(ids, past_key_values=c, attention_mask=whole) for m, c in zip(models, caches)))
        begin += T
    assert [int(c.get_seq_length()) for c in caches] == [13, 13, 13]


def test_decoding_step_by_step_equals_one_call(language_models):
    ours = language_models[torch.float32].ours
    with torch.no_grad():
        whole = ours(IDS).logits
        cache = DynamicCache(config=ours.config)
        steps = [ours(IDS[:, i : i + 1], past_key_values=cache).logits for i in range(9)]
    assert torch.equal(torch.cat(steps, 1), whole)


def test_rows_do_not_depend_on_the_batch(language_models):
    ours = language_models[torch.float32].ours
    with torch.no_grad():
        whole = ours(IDS).logits
        rows = [ours(IDS[i : i + 1]).logits for i in range(3)]
    assert torch.equal(torch.cat(rows), whole)


@pytest.mark.parametrize("implementation", ("sdpa", "eager"))
@pytest.mark.parametrize("mask", (None, padded(3, 5)), ids=("no mask", "mask"))
def test_cross_attention(mask, implementation):
    models = trio(add_cross_attention=True, implementation=implementation)
    encoder = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(4))
    arguments = dict(encoder_hidden_states=encoder, encoder_attention_mask=mask)
    same(models, IDS, output_attentions=True, use_cache=False, **arguments)
    same(models, IDS)  # without an encoder there is no cross attention
    first = [m(IDS, attention_mask=padded(), **_for(m, models, arguments)) for m in models]
    compare(*first)
    longer = torch.cat([padded(), torch.ones(3, 1, dtype=torch.long)], 1)
    second = [
        m(IDS[:, :1], attention_mask=longer, past_key_values=out.past_key_values, **_for(m, models, arguments))
        for m, out in zip(models, first)
    ]
    compare(*second)


def _for(model, models, arguments):
    encoder = arguments["encoder_hidden_states"]
    return arguments | dict(encoder_hidden_states=encoder.double() if model is models.truth else encoder)


def test_custom_4d_mask_with_a_cache(language_models):
    models = language_models[torch.float32]
    caches = [DynamicCache(config=models.plain.config) for _ in models]
    tree = torch.ones(3, 1, 4, 13, dtype=torch.bool)
    tree[:, :, :, 9:] = torch.eye(4, dtype=torch.bool)
    with torch.no_grad():
        compare(*(m(IDS, past_key_values=c) for m, c in zip(models, caches)))
        again = [m(IDS[:, :4], past_key_values=c, attention_mask=tree) for m, c in zip(models, caches)]
    compare(*again)


def test_bad_arguments(language_models):
    ours = language_models[torch.float32].ours
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        ours()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        ours(IDS, inputs_embeds=EMBEDS)
    with pytest.raises(ValueError, match=r"tokens must lie in \[0, 211\)"):
        ours(IDS + 210)
    with pytest.raises(ValueError, match=r"positions must lie in \[0, 48\)"):
        ours(tokens(1, 49))
    with pytest.raises(ValueError, match="cross attention"):
        ours(IDS, encoder_hidden_states=EMBEDS)
