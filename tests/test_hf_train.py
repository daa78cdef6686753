"""Training through the drop-in: gradients, dropout, checkpointing, autocast, compile, Trainer."""

import copy
import sys

import pytest
import torch
import transformers
from hf_models import Trio, compare, one_thread, padded, same, same_gradients, tokens, trio  # noqa: F401
from torch.utils.data import Dataset
from transformers.loss.loss_utils import ForCausalLMLoss

import gpt2fast
from gpt2fast.testing import assert_close_to_truth

IDS = tokens()
NO_DROPOUT = dict(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)


def backward(models, seed: int = 11, **kwargs):
    for model in models:
        model.zero_grad()
        torch.manual_seed(seed)
        model(IDS, labels=IDS, attention_mask=padded(left=False), **kwargs).loss.backward()
    same_gradients(models)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("activation", ("gelu_new", "gelu", "relu"))
def test_gradients(activation, dtype):
    backward(trio(dtype=dtype, activation_function=activation))


def test_gradients_of_frozen_and_of_embedded_inputs():
    models = trio()
    embeds = torch.randn(3, 9, 64, generator=torch.Generator().manual_seed(0))
    leaves = []
    for model in models:
        model.transformer.requires_grad_(False)
        model.lm_head.requires_grad_(False)
        leaf = (embeds.double() if model is models.truth else embeds.clone()).requires_grad_()
        model(inputs_embeds=leaf, labels=IDS).loss.backward()
        leaves.append(leaf.grad)
    assert_close_to_truth(leaves[1], leaves[0], leaves[2])


@pytest.mark.parametrize("reentrant", (False, True))
def test_gradient_checkpointing(reentrant):
    models = trio(**NO_DROPOUT | dict(attn_pdrop=0.3))
    ours, again = models.ours.train(), copy.deepcopy(models.ours).train()
    again.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    for model in (ours, again):
        torch.manual_seed(1)
        model(IDS, labels=IDS, attention_mask=padded(), use_cache=False).loss.backward()
    for (name, a), b in zip(ours.named_parameters(), again.parameters()):
        assert torch.equal(a.grad, b.grad), name


def test_dropouts_but_attention_draw_what_transformers_draws():
    models = trio(attn_pdrop=0.0, resid_pdrop=0.3, embd_pdrop=0.2).apply(lambda model: model.train())
    backward(models)
    torch.manual_seed(5)
    first = models.ours(IDS).logits
    assert not torch.equal(first, models.ours(IDS).logits)
    torch.manual_seed(5)
    assert torch.equal(first, models.ours(IDS).logits)


def test_attention_dropout_rate_scale_and_mask():
    """With one key for each query, a head's output is its value, scaled, or zero. The gradient has the same mask."""
    p, rows = 0.3, 4000
    attn = trio(attn_pdrop=p, resid_pdrop=0.0).ours.transformer.h[0].attn.train()
    with torch.no_grad():
        attn.c_proj.weight.copy_(torch.eye(64))
        attn.c_proj.bias.zero_()
    x = torch.randn(rows, 1, 64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(2)
    value = attn.c_attn(x)[..., 128:].detach().requires_grad_()
    attn.c_attn.register_forward_hook(lambda m, a, out: torch.cat([out[..., :128], value], -1))
    out = attn(x)[0]
    out.sum().backward()
    kept = out.view(rows, 4, 16) != 0
    assert torch.equal(kept.all(-1), kept.any(-1))
    assert torch.equal(value.grad != 0, out != 0)
    scaled = torch.where(out != 0, value / (1 - p), 0.0)
    assert_close_to_truth(out, scaled, torch.where(out != 0, value.double() / (1 - p), 0.0))
    heads = kept.any(-1)
    rate, expected_deviation = 1 - heads.float().mean().item(), (p * (1 - p) / heads.numel()) ** 0.5
    assert abs(rate - p) < 5 * expected_deviation
    together = (heads[:, 0] & heads[:, 1]).float().mean().item()  # heads are independent
    assert abs(together - (1 - p) ** 2) < 5 * (0.25 / rows) ** 0.5
    attn.eval()
    assert attn(x)[0].count_nonzero() == out.numel()


def test_attention_dropout_keeps_the_mean():
    models = trio(**NO_DROPOUT | dict(attn_pdrop=0.2))
    attn = models.ours.transformer.h[0].attn
    x = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0)).expand(2000, -1, -1)
    with torch.no_grad():
        expected = attn(x[:1])[0]
        torch.manual_seed(0)
        drawn = attn.train()(x)[0]
    z = (drawn.mean(0) - expected[0]) / (drawn.std(0) / 2000**0.5)
    assert z.abs().max() < 6  # the largest of 384 normals is near 3


def test_dropout_of_one():
    models = trio(attn_pdrop=1.0, resid_pdrop=0.0, embd_pdrop=0.0).apply(lambda model: model.train())
    same(models, IDS)


def test_autocast():
    models = trio()
    outs = []
    for model in models[:2]:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            outs.append(model(IDS, attention_mask=padded(), output_hidden_states=True, use_cache=False))
    with torch.no_grad():
        truth = models.truth(IDS, attention_mask=padded(), output_hidden_states=True, use_cache=False)
    compare(*outs, truth)  # dtypes as well: the residual stream stays float32
    assert outs[1].hidden_states[1].dtype == torch.float32 and outs[1].logits.dtype == torch.bfloat16
    for model in models:
        with torch.autocast("cpu", torch.bfloat16, enabled=model is not models.truth):
            loss = model(IDS, labels=IDS).loss
        loss.backward()
    same_gradients(models)


@pytest.fixture
def few_rows(monkeypatch):
    """Makes a chunk of head and loss 7 rows, so that small inputs have many chunks."""
    module = sys.modules["gpt2fast.ops.linear_cross_entropy"]
    for name in ("MOST_ROWS", "FEW_ROWS"):
        monkeypatch.setattr(module, name, 7)


@pytest.mark.parametrize("items", (None, 5), ids=("mean", "num_items_in_batch"))
@pytest.mark.parametrize("tied", (True, False), ids=("tied", "untied"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_fused_loss(dtype, tied, items, few_rows):
    """Compares the loss and all gradients, without logits. Truth and plain use transformers' own loss."""
    models = trio(dtype=dtype, tie_word_embeddings=tied, **NO_DROPOUT).apply(lambda model: model.train())
    assert gpt2fast.optimize(models.ours, fused_loss=True) is models.ours
    losses = []
    for model in models:
        out = model(IDS, labels=IDS, attention_mask=padded(left=False), num_items_in_batch=items)
        assert (out.logits is None) == (model is models.ours)
        out.loss.backward()
        losses.append(out.loss.detach())
    assert_close_to_truth(losses[1][None], losses[0][None].float(), losses[2][None])
    same_gradients(models)


def test_fused_loss_gives_logits_where_they_are_asked_for(few_rows):
    ours = gpt2fast.optimize(trio(**NO_DROPOUT).ours, fused_loss=True)
    plain = ours(IDS, labels=IDS)
    assert plain.logits.shape == (*IDS.shape, ours.config.vocab_size)  # in evaluation mode
    ours.train()
    assert torch.equal(ours(IDS).logits, plain.logits)
    assert ours(IDS, labels=IDS).logits is None
    assert ours(IDS, labels=IDS, logits_to_keep=IDS.shape[1]).logits is not None
    report = gpt2fast.report(ours)
    assert report["lm_head"].op == report["loss_function"].op == "linear_cross_entropy"
    assert report["lm_head"].backward == "fused"
    hook = ours.lm_head.register_forward_hook(lambda *_: None)
    assert ours(IDS, labels=IDS).logits is not None
    said = gpt2fast.report(ours)["loss_function"]
    assert said.op == "cross_entropy" and said.reason == "not fused with lm_head: of lm_head it has a forward hook"
    hook.remove()
    ours.loss_function = ForCausalLMLoss
    assert ours(IDS, labels=IDS).logits is not None
    del ours._loss_function
    assert gpt2fast.optimize(ours)(IDS, labels=IDS).logits is not None  # as the default says
    gpt2fast.optimize(ours, fused_loss=True)
    assert "fused_loss" not in vars(gpt2fast.restore(ours))
    with pytest.raises(ValueError, match="fused_loss needs a GPT2LMHeadModel, got GPT2Model"):
        gpt2fast.optimize(trio("GPT2Model").ours, fused_loss=True)


def test_fused_loss_of_a_frozen_head_and_under_autocast_and_compile(few_rows):
    models = trio(tie_word_embeddings=False, **NO_DROPOUT).apply(lambda model: model.train())
    gpt2fast.optimize(models.ours, fused_loss=True)
    models.apply(lambda model: model.lm_head.requires_grad_(False))
    backward(models)
    assert models.ours.lm_head.weight.grad is None
    models.apply(lambda model: model.lm_head.requires_grad_(True))
    for model in models:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=model is not models.truth):
            loss = model(IDS, labels=IDS).loss
        loss.backward()
    same_gradients(models)
    expected = [p.grad.clone() for p in models.ours.parameters()]
    models.ours.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        torch.compile(models.ours, backend="aot_eager")(IDS, labels=IDS).loss.backward()
    for p, other in zip(models.ours.parameters(), expected):
        assert torch.equal(p.grad, other)


def test_replaced_loss_function():
    models = trio()
    expected = models.ours(IDS, labels=IDS).loss
    calls = []

    def mine(logits, labels, vocab_size, **kwargs):
        calls.append(sorted(kwargs))
        return ForCausalLMLoss(logits, labels, vocab_size) * 3

    models.ours.loss_function = mine
    found = models.ours(IDS, labels=IDS, num_items_in_batch=5).loss
    assert calls == [["num_items_in_batch"]]
    assert_close_to_truth(found[None], (expected * 3)[None], (expected.double() * 3)[None])
    assert gpt2fast.report(models.ours)["loss_function"].reason == "it is replaced"


class Texts(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = tokens(1, 10, seed=index)[0]
        return dict(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids))


def test_trainer(tmp_path):
    models = trio(**NO_DROPOUT)
    logs = []
    for model in models:
        settings = transformers.TrainingArguments(
            tmp_path,
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=0.1,
            optim="sgd",
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            seed=3,
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, settings, train_dataset=Texts())
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(logs[1]) == 4 and logs[1][-1] < logs[1][0]
    plain, ours, truth = (torch.tensor(log, dtype=torch.float64) for log in logs)
    assert_close_to_truth(ours.float(), plain.float(), truth)
    every = zip(models.plain.named_parameters(), models.ours.parameters(), models.truth.parameters())
    for (name, p), o, t in every:
        assert_close_to_truth(o.detach(), p.detach(), t.detach(), name)
