"""Fusion never hides a user's change: each change acts as in transformers, and the report says what it stopped."""

import copy
import pickle

import accelerate
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from hf_models import CLASSES, Trio, config, generates_the_same, one_thread, padded, same, tokens, trio  # noqa: F401
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.pytorch_utils import Conv1D

import gpt2fast
from gpt2fast.hf.convert import to_ours

IDS = tokens()
PARTS = (
    "transformer.h.1",
    "transformer.h.1.ln_1",
    "transformer.h.1.attn",
    "transformer.h.1.attn.c_attn",
    "transformer.h.1.attn.c_proj",
    "transformer.h.1.attn.resid_dropout",
    "transformer.h.1.ln_2",
    "transformer.h.1.mlp",
    "transformer.h.1.mlp.c_fc",
    "transformer.h.1.mlp.act",
    "transformer.h.1.mlp.c_proj",
    "transformer.h.1.mlp.dropout",
    "transformer.wte",
    "transformer.wpe",
    "transformer.drop",
    "transformer.ln_f",
    "transformer",
    "lm_head",
)


def doubled(output):
    if isinstance(output, torch.Tensor):
        return output * 2
    if isinstance(output, tuple):
        return (output[0] * 2, *output[1:])
    output["last_hidden_state"] = output["last_hidden_state"] * 2
    return output


def changes_output(models: Trio, change, **kwargs) -> Trio:
    """Applies ``change`` to all three models. Ours must stay equal to transformers, and differ from before."""
    before = models.ours(IDS, **kwargs).logits
    models.apply(change)
    after = same(models, IDS, attention_mask=padded(), **kwargs).logits
    after = same(models, IDS, **kwargs).logits
    assert not torch.allclose(before, after)
    generates_the_same(models)
    return models


@pytest.mark.parametrize("part", PARTS)
def test_forward_hook(part):
    models = trio(tie_word_embeddings=False)
    handles = []

    def change(model):
        hook = model.get_submodule(part).register_forward_hook(lambda module, args, output: doubled(output))
        handles.append(hook)

    changes_output(models, change)
    assert any("hook" in reason for reason in gpt2fast.report(models.ours).reasons.values())
    for handle in handles:
        handle.remove()
    assert gpt2fast.report(models.ours).reasons == {}
    same(models, IDS)
    generates_the_same(models)


@pytest.mark.parametrize("part", PARTS[:4])
def test_pre_hook_sees_what_it_sees_in_transformers(part):
    seen = []

    def change(model):
        def hook(module, args, kwargs):
            mask = kwargs.get("attention_mask", args[2] if len(args) > 2 else None)
            seen.append(mask if mask is None or isinstance(mask, torch.Tensor) else type(mask))
            return (args[0] * 1.5, *args[1:]), kwargs

        model.get_submodule(part).register_forward_pre_hook(hook, with_kwargs=True)

    models = trio().apply(change)
    same(models, IDS, attention_mask=padded())
    plain, ours, _ = seen
    assert type(ours) is type(plain)
    assert plain is None or torch.equal(ours, plain)


@pytest.mark.parametrize("part", ("transformer.h.0", "transformer.h.0.attn", "transformer.h.0.mlp.c_fc"))
def test_backward_hook_is_called(part):
    models, calls = trio(), []
    module = models.ours.get_submodule(part)
    module.register_full_backward_hook(lambda module, given, grads: calls.append(type(module)))
    models.ours(IDS, labels=IDS).loss.backward()
    assert calls == [type(module)]
    assert "backward hook" in " ".join(gpt2fast.report(models.ours).reasons.values())


def test_global_hook_is_called():
    models, calls = trio(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, o: calls.append(type(m).__name__))
    try:
        models.plain(IDS)
        expected = list(calls)
        calls.clear()
        models.ours(IDS)
        assert calls == expected
        assert "a hook on all modules" in " ".join(gpt2fast.report(models.ours).reasons.values())
    finally:
        handle.remove()


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


@pytest.mark.parametrize("part", ("transformer.h.0.mlp.c_fc", "transformer.h.1.attn.c_proj", "transformer.h.1.ln_2"))
def test_parametrization(part):
    def change(model):
        parametrize.register_parametrization(model.get_submodule(part), "weight", Doubled())

    models = changes_output(trio(), change)
    assert "Parametrized" in " ".join(gpt2fast.report(models.ours).reasons.values())
    for model in models:
        parametrize.remove_parametrizations(model.get_submodule(part), "weight", leave_parametrized=False)
    same(models, IDS)
    generates_the_same(models)
    assert gpt2fast.report(models.ours).reasons == {}


class Shifted(Conv1D):
    def forward(self, x):
        return super().forward(x) + 1


def replace_by(kind):
    def change(model):
        old = model.transformer.h[0].mlp.c_fc
        new = kind(old.nf, old.nx).to(old.weight.dtype)
        new.load_state_dict(old.state_dict())
        with torch.no_grad():
            new.bias += 0.5
        model.transformer.h[0].mlp.c_fc = new

    return change


@pytest.mark.parametrize("kind", (Conv1D, Shifted), ids=("the stock class", "a subclass"))
def test_replaced_c_fc(kind):
    models = changes_output(trio(), replace_by(kind))
    reasons = gpt2fast.report(models.ours).reasons
    assert reasons == {} if kind is Conv1D else "Shifted is not ours" in reasons["transformer.h.0.mlp.c_fc"]


@pytest.mark.parametrize("part", ("transformer.h.0.mlp", "transformer.h.0.attn", "transformer.h.1", "lm_head"))
def test_overridden_forward(part):
    def change(model):
        module = model.get_submodule(part)
        forward = module.forward
        module.forward = lambda *args, **kwargs: doubled(forward(*args, **kwargs))

    models = changes_output(trio(tie_word_embeddings=False), change)
    assert "forward is replaced" in " ".join(gpt2fast.report(models.ours).reasons.values())


def test_other_activation_module():
    models = changes_output(trio(), lambda model: setattr(model.transformer.h[0].mlp, "act", nn.Tanh()))
    assert "no GELU" in gpt2fast.report(models.ours)["transformer.h.0.mlp.c_fc"].reason


def test_pruning():
    def change(model):
        prune.l1_unstructured(model.transformer.h[0].mlp.c_fc, "weight", amount=0.5)

    changes_output(trio(), change)


def test_changed_attributes():
    def change(model):
        model.transformer.h[0].attn.scaling = 0.7
        model.transformer.h[1].ln_1.eps = 0.5

    models = changes_output(trio(), change)
    assert "scaling" in gpt2fast.report(models.ours)[""].reason


def test_attention_not_causal():
    changes_output(trio(), lambda model: setattr(model.transformer.h[0].attn, "is_causal", False))


def test_registered_attention(monkeypatch):
    def halved(*args, **kwargs):
        out, weights = sdpa_attention_forward(*args, **kwargs)
        return out / 2, weights

    models = trio()
    before = models.ours(IDS).logits
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", halved)
    after = same(models, IDS).logits
    assert not torch.allclose(before, after)
    generates_the_same(models)
    assert "another function is registered" in str(gpt2fast.report(models.ours))


def test_attention_set_to_eager_later():
    models = trio().apply(lambda model: model.set_attn_implementation("eager"))
    found = same(models, IDS, attention_mask=padded(), output_attentions=True)
    assert len(found.attentions) == 2 and found.attentions[0].shape == (3, 4, 9, 9)
    generates_the_same(models)
    assert "attn_implementation is 'eager'" in gpt2fast.report(models.ours)["transformer.h.0.attn"].reason


class Scale(ModelHook):
    def pre_forward(self, module, *args, **kwargs):
        return (args[0] * 1.5, *args[1:]), kwargs


@pytest.mark.parametrize("part", ("transformer.h.0", "transformer.h.0.attn", "transformer.h.0.mlp.c_proj"))
def test_accelerate_hook(part):
    models = changes_output(trio(), lambda model: add_hook_to_module(model.get_submodule(part), Scale()))
    for model in models:
        accelerate.hooks.remove_hook_from_submodules(model)
    assert gpt2fast.report(models.ours).reasons == {}
    generates_the_same(models)


def test_optimize_under_accelerate_hooks():
    models, ours = trio(), gpt2fast.restore(trio().ours)
    for model in (models.plain, ours, models.truth):
        add_hook_to_module(model.transformer.h[0].attn, Scale())
    gpt2fast.optimize(ours)
    assert ours.transformer.h[0].attn._old_forward.__func__ is type(ours.transformer.h[0].attn).forward
    same(Trio(models.plain, ours, models.truth), IDS, attention_mask=padded())
    accelerate.hooks.remove_hook_from_submodules(ours)
    assert gpt2fast.report(ours).reasons == {}
    plain = trio()
    same(Trio(plain.plain, ours, plain.truth), IDS)
    same(Trio(plain.plain, gpt2fast.restore(ours), plain.truth), IDS)


def test_accelerate_dispatch_and_offload(tmp_path):
    models = trio()
    ours = copy.deepcopy(models.ours)
    accelerate.cpu_offload(ours, execution_device="cpu")
    dispatched = Trio(models.plain, ours, models.truth)
    same(dispatched, IDS, attention_mask=padded())
    expected = models.plain.generate(IDS[:1], max_new_tokens=5, do_sample=False)
    assert torch.equal(ours.generate(IDS[:1], max_new_tokens=5, do_sample=False), expected)
    on_disk = copy.deepcopy(models.ours)
    accelerate.disk_offload(on_disk, tmp_path, execution_device="cpu")
    same(Trio(models.plain, on_disk, models.truth), IDS)


def test_compiled_submodule():
    models = trio().apply(lambda model: model.transformer.h[0].mlp.compile(backend="eager"))
    same(models, IDS)
    generates_the_same(models)


@pytest.mark.parametrize("kind", CLASSES)
def test_optimize_and_restore(kind):
    plain = getattr(transformers, kind)(config(pad_token_id=0)).eval()
    classes = {name: type(module) for name, module in plain.named_modules()}
    expected = plain(IDS)[0]
    model = copy.deepcopy(plain)
    assert gpt2fast.optimize(model) is model
    for name, module in model.named_modules():
        assert isinstance(module, classes[name]) and type(module).__name__ == classes[name].__name__
    switched = [n for n, m in model.named_modules() if type(m) in to_ours().values()]
    assert len(switched) == 2 * 10 + 2 + (kind != "GPT2Model")  # ten a block, GPT2Model, ln_f and the head's class
    assert gpt2fast.restore(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert torch.equal(model(IDS)[0], expected)
    assert type(getattr(gpt2fast, kind)(config(pad_token_id=0))) is getattr(gpt2fast, kind)


def test_optimize_reaches_into_wrappers_and_leaves_the_rest():
    wrapper = nn.ModuleDict(dict(lm=trio().plain, norm=nn.LayerNorm(4), other=Conv1D(3, 4)))
    gpt2fast.optimize(wrapper)
    assert type(wrapper["lm"]) is gpt2fast.GPT2LMHeadModel
    assert type(wrapper["norm"]) is nn.LayerNorm and type(wrapper["other"]) is Conv1D


class Mine(transformers.GPT2LMHeadModel):
    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = -found.logits
        return found


def test_a_subclass_keeps_its_class():
    plain = Mine(config()).eval()
    ours = gpt2fast.optimize(copy.deepcopy(plain))
    assert type(ours) is Mine and type(ours.transformer) is gpt2fast.GPT2Model
    mine = Trio(plain, ours, copy.deepcopy(plain).double())
    same(mine, IDS)
    generates_the_same(mine)
    assert "Mine" in gpt2fast.report(ours)[""].reason


def test_what_is_no_gpt2():
    for function in (gpt2fast.optimize, gpt2fast.restore, gpt2fast.report):
        with pytest.raises(TypeError, match="must be or hold a GPT-2 of transformers, got Linear"):
            function(nn.Linear(2, 2))
        with pytest.raises(TypeError, match="must be a torch.nn.Module, got str"):
            function("gpt2")


def test_nothing_global_changes():
    before = {name: getattr(transformers.models.gpt2.modeling_gpt2, name).forward for name in CLASSES}
    trio()
    assert {name: getattr(transformers.models.gpt2.modeling_gpt2, name).forward for name in CLASSES} == before
    assert type(transformers.AutoModelForCausalLM.from_config(config())) is transformers.GPT2LMHeadModel
    assert type(transformers.GPT2LMHeadModel(config()).transformer.h[0].ln_1) is nn.LayerNorm


def test_pickle_and_deepcopy():
    models = trio()
    for ours in (pickle.loads(pickle.dumps(models.ours)), copy.deepcopy(models.ours)):
        assert type(ours) is gpt2fast.GPT2LMHeadModel and type(ours.transformer.h[0]) is type(
            models.ours.transformer.h[0]
        )
        found = same(Trio(models.plain, ours, models.truth), IDS, output_hidden_states=True)
        assert len(found.hidden_states) == 3
