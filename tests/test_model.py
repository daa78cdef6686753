"""The native model against transformers by the parity rule; also its cache, training mode and replaceable parts."""

import sys

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2fast import activations
from gpt2fast.cache import Cache
from gpt2fast.config import Config
from gpt2fast.model import GPT2, Block
from gpt2fast.testing import assert_close_to_truth

SIZES = dict(n_layer=2, n_embd=48, n_head=3, vocab_size=97, n_positions=40, bos_token_id=0, eos_token_id=0)


def make(dtype=torch.float32, **changes) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(**(SIZES | dict(initializer_range=0.1) | changes))).eval()
    for parameter in hf.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return hf.to(dtype)


def wide(hf: GPT2LMHeadModel) -> GPT2LMHeadModel:
    twin = GPT2LMHeadModel(hf.config).eval()
    twin.load_state_dict(hf.state_dict())
    return twin.double()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(1))


def check(hf, ours: dict | None = None, theirs: dict | None = None, rows=slice(None)):
    ids = tokens(3, 17)
    with torch.no_grad():
        plain, truth = (m(ids, **(theirs or {})).logits for m in (hf, wide(hf)))
        actual = GPT2.from_transformers(hf)(ids, **(ours or {}))
    assert actual.dtype == plain.dtype
    assert_close_to_truth(actual[rows], plain[rows], truth[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [
    dict(), dict(scale_attn_by_inverse_layer_idx=True), dict(scale_attn_weights=False),
    dict(tie_word_embeddings=False, n_inner=70, layer_norm_epsilon=1e-2),
], ids=str)  # fmt: skip
def test_logits(dtype, changes):
    check(make(dtype, **changes))


@pytest.mark.parametrize("name", [*activations.FUSED, *activations.PLAIN])
def test_activations(name):
    check(make(activation_function=name))


def test_positions_token_types_and_logits_to_keep():
    positions, types = torch.arange(17).flip(0)[None] + 5, tokens(3, 17).flip(0)
    check(make(), dict(positions=positions, token_types=types), dict(position_ids=positions, token_type_ids=types))
    check(make(), dict(logits_to_keep=3), dict(logits_to_keep=3))
    check(make(), dict(logits_to_keep=torch.tensor([1, 4])), dict(logits_to_keep=torch.tensor([1, 4])))


@pytest.mark.parametrize("kind", [torch.bool, torch.int64])
def test_padding(kind):
    mask = torch.ones(3, 17, dtype=kind)
    mask[0, :5] = mask[1, 11:] = 0
    seen = mask.bool()  # the results of padding tokens do not matter
    check(make(), dict(mask=mask), dict(attention_mask=mask.long()), rows=seen)


@pytest.mark.parametrize("steps", [(17,), (1,) * 17, (5, 1, 11), (9, 8)])
@pytest.mark.parametrize("hidden", [None, "left", "holes"])
def test_a_cache_changes_nothing(steps, hidden):
    model, ids, mask = GPT2.from_transformers(make()), tokens(3, 17), torch.ones(3, 17, dtype=torch.bool)
    if hidden == "left":
        mask[0, :4] = mask[2, :1] = False
    if hidden == "holes":
        mask[0, 2:4] = mask[2, :1] = mask[2, 10] = False
    cache, at, pieces = model.new_cache(3, capacity=3), 0, []
    with torch.no_grad():
        whole = model(ids, mask=mask)
        for step in steps:
            part = mask[:, at : at + step]
            pieces.append(model(ids[:, at : at + step], mask=None if part.all() else part, cache=cache))
            at += step
        truth = wide(make())(ids, attention_mask=mask.long()).logits
    assert cache.length == 17 and cache.capacity >= 17
    assert_close_to_truth(torch.cat(pieces, 1)[mask], whole[mask], truth[mask])


def test_a_fixed_cache_decodes_as_one_that_grows():
    model, ids = GPT2.from_transformers(make()), tokens(2, 12)
    mask = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    with torch.no_grad():
        fixed, grown = model.new_cache(2, 12), model.new_cache(2, 12)
        for cache in (fixed, grown):
            model(ids[:, :6], mask=mask, cache=cache)
        fixed.fix()
        for at in (slice(6, 7), slice(7, 10), slice(10, 12)):
            assert torch.equal(model(ids[:, at], cache=fixed), model(ids[:, at], cache=grown))
        assert fixed.lengths.tolist() == [12, 12] and fixed.length == 6
        with pytest.raises(ValueError, match=r"mask must be None in a fixed cache, got one of \(2, 1\)"):
            model(ids[:, :1], mask=torch.tensor([[True], [False]]), cache=fixed)
        with pytest.raises(ValueError, match="select must not be called on a fixed cache"):
            fixed.select(torch.tensor([0]))


def test_cache_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        Cache(1, 1, 1, 1, capacity=0)
    cache = Cache(1, 2, 3, 4, capacity=2, limit=8)
    cache.advance(3)
    assert cache.capacity == 4
    with pytest.raises(ValueError, match="at most 8 columns fit"):
        cache.advance(6)


@pytest.mark.parametrize("change, error, message", [
    (dict(batch=3), ValueError, "batch must be 2, got 3"),
    (dict(layers=1), ValueError, "layers must be 2, got 1"),
    (dict(heads=2), ValueError, "heads must be 3, got 2"),
    (dict(head_size=8), ValueError, "head_size must be 16, got 8"),
    (dict(dtype=torch.bfloat16), TypeError, "dtype must be float32, got bfloat16"),
])  # fmt: skip
def test_a_cache_of_another_model_is_refused_and_stays_empty(change, error, message):
    cache = Cache(**(dict(layers=2, batch=2, heads=3, head_size=16) | change))
    with pytest.raises(error, match=message):
        GPT2.from_transformers(make())(tokens(2, 4), cache=cache)
    assert cache.length == 0


def test_from_transformers_shares_the_parameters():
    hf = make()
    model = GPT2.from_transformers(hf)
    assert model.wte.weight is hf.transformer.wte.weight and model.lm_head is None
    assert set(model.state_dict()) == {n.removeprefix("transformer.") for n in hf.state_dict()} - {"lm_head.weight"}
    hf.transformer.h[0].attn.c_attn.weight.requires_grad_(False)
    assert not GPT2.from_transformers(hf).h[0].attn.c_attn.weight.requires_grad
    with pytest.raises(ValueError, match="add_cross_attention must be false"):
        GPT2.from_transformers(make(add_cross_attention=True))


@pytest.mark.parametrize("activation, rows", [("gelu_new", None), ("gelu", None), ("relu", None), ("gelu", 20)])
def test_loss_and_gradients(activation, rows, monkeypatch):
    if rows:  # rows of a chunk of head and loss
        for module in ("gpt2fast.loss", "gpt2fast.ops.linear_cross_entropy"):
            monkeypatch.setattr(sys.modules[module], "MOST_ROWS", rows)
    hf = make(activation_function=activation)
    ids, labels = tokens(3, 17), tokens(3, 17).flip(0)
    labels[0, :4] = -100
    truth, found = wide(hf), {}
    for name, m in (("plain", hf), ("truth", truth)):
        logits = m(ids).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        grads = {n.removeprefix("transformer."): p.grad for n, p in m.named_parameters()}
        found[name] = (loss.detach(), grads)
    hf.zero_grad()
    model = GPT2.from_transformers(hf)
    loss = model(ids, targets=labels)
    loss.backward()
    assert_close_to_truth(loss.detach(), found["plain"][0], found["truth"][0], "loss")
    for name, parameter in model.named_parameters():
        assert_close_to_truth(parameter.grad, found["plain"][1][name], found["truth"][1][name], name)


def test_dropout_follows_torch_s_generator_and_keeps_the_mean():
    model = GPT2(Config(**SIZES, embd_pdrop=0.3, resid_pdrop=0.3, attn_pdrop=0.3))
    ids = tokens(2, 17)
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model.train()
        runs.append(model(ids, targets=ids))
    assert runs[0] == runs[1] != runs[2]
    runs[0].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert torch.equal(model.eval()(ids), model(ids))


@pytest.mark.parametrize("name", ["embd_pdrop", "resid_pdrop", "attn_pdrop"])
def test_each_dropout_acts_alone_in_training(name):
    model = GPT2(Config(**SIZES, **(dict(embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0) | {name: 0.5})))
    ids = tokens(2, 17)
    assert not torch.equal(model.train()(ids), model.eval()(ids))


def test_autocast_keeps_the_residual_stream_in_float32():
    hf = make()
    model, ids, seen = GPT2.from_transformers(hf), tokens(3, 17), []
    model.ln_f.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual, plain = model(ids), hf(ids).logits
    assert seen == [torch.float32] and actual.dtype == plain.dtype == torch.bfloat16
    assert_close_to_truth(actual, plain, wide(hf)(ids).logits.detach())


def test_another_block_can_stand_in():
    class Parallel(Block):
        def forward(self, x, mask=None, cache=None):
            return self.attn(self.ln_1(x), x, mask, cache) + self.mlp(self.ln_2(x), torch.zeros_like(x))

    model = GPT2(Config(**SIZES), block=Parallel).eval()
    out = model.generate(tokens(1, 4), max_new_tokens=5, eos_token_id=[])
    logits = model(out[:, :-1])
    assert torch.equal(logits.argmax(-1)[:, 3:], out[:, 4:])


def test_compiles_without_a_graph_break():
    model, ids = GPT2(Config(**SIZES)).eval(), tokens(2, 6)
    torch.compiler.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(ids), model(ids))


@pytest.mark.parametrize("args, error, message", [
    ((torch.tensor([[1, 97]]),), ValueError, r"tokens must lie in \[0, 97\)"),
    ((torch.tensor([[-1, 3]]),), ValueError, r"tokens must lie in \[0, 97\)"),
    ((torch.ones(1, 3),), TypeError, "tokens must have dtype int64, got float32"),
    ((torch.ones(3, dtype=torch.int64),), ValueError, "tokens must have shape"),
    ((torch.ones(1, 3, device="meta").long(),), ValueError, "must be on meta as tokens is, got cpu"),
    ((torch.ones(1, 41, dtype=torch.int64),), ValueError, r"positions must lie in \[0, 40\)"),
    ((torch.ones(1, 2, dtype=torch.int64), torch.tensor([[3, 40]])), ValueError, r"positions must lie in \[0, 40\)"),
    ((torch.ones(1, 2, dtype=torch.int64), None, torch.ones(1, 3).bool()), ValueError, r"mask must have .*\(1, 2\)"),
    ((torch.ones(1, 2, dtype=torch.int64), None, torch.ones(1, 2)), TypeError, "mask must hold bools or integers"),
])  # fmt: skip
def test_bad_input(args, error, message):
    with pytest.raises(error, match=message):
        GPT2(Config(**SIZES)).eval()(*args)


def test_the_cache_is_untouched_by_refused_tokens():
    model = GPT2(Config(**SIZES)).eval()
    cache = model.new_cache(1)
    with torch.no_grad():
        model(tokens(1, 3), cache=cache)
        with pytest.raises(ValueError, match="tokens must lie"):
            model(torch.tensor([[97]]), cache=cache)
    assert cache.length == 3 and cache.lengths.tolist() == [3]


@pytest.mark.parametrize("change, message", [
    (dict(n_embd=50), "n_embd must be a multiple of n_head = 3, got 50"),
    (dict(n_layer=0), "n_layer must be a positive integer of at most 10000, got 0"),
    (dict(vocab_size="many"), "vocab_size must be a positive integer of at most 2147483647, got 'many'"),
        (dict(n_layer=10**9), "n_layer must be a positive integer of at most 10000, got 1000000000"),
        (dict(n_inner=2**31), "n_inner must be None or a positive integer of at most 2147483647, got 2147483648"),
    (dict(attn_pdrop=1.0), r"attn_pdrop must be a number in \[0, 1\), got 1.0"),
    (dict(layer_norm_epsilon=-1), "layer_norm_epsilon must be a number of at least 0, got -1"),
    (dict(tie_word_embeddings="no"), "tie_word_embeddings must be true or false, got 'no'"),
    (dict(eos_token_id=[1, None]), "eos_token_id must be None, an integer or a list"),
    (dict(model_type="llama"), "model_type must be 'gpt2', got 'llama'"),
    (dict(activation_function="gelu_newest"), "activation_function must be one of gelu,"),
])  # fmt: skip
def test_impossible_configs(change, message):
    with pytest.raises(ValueError, match=message):
        GPT2(Config.from_dict(SIZES | change))


def test_config_round_trip():
    values = GPT2Config(**SIZES, task_specific_params={"a": 1}).to_dict() | {"hidden_size": 48, "surprise": [1]}
    config = Config.from_dict(values)
    assert config.extra["surprise"] == [1] and config.n_embd == 48 and Config.from_dict(config.to_dict()) == config
    assert Config.from_dict({"num_hidden_layers": 3, "torch_dtype": "torch.bfloat16"}).dtype == "bfloat16"
