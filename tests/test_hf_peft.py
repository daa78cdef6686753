"""PEFT's adapters give the outputs, texts and gradients of transformers' model; merged, disabled, saved or loaded."""

import copy
import pickle

import peft
import pytest
import torch
from hf_models import Trio, generates_the_same, one_thread, padded, same, same_gradients, tokens, trio  # noqa: F401

import gpt2fast

IDS = tokens()
LORA = dict(r=4, fan_in_fan_out=True, init_lora_weights=False)
VARIANTS = {
    "lora": peft.LoraConfig(target_modules=["c_attn", "c_fc"], **LORA),
    "lora of c_fc": peft.LoraConfig(target_modules=["c_fc"], **LORA),
    "lora of all": peft.LoraConfig(target_modules=["c_attn", "c_proj", "c_fc", "lm_head", "wte"], **LORA),
    "rank stabilised": peft.LoraConfig(target_modules=["c_proj"], use_rslora=True, **LORA),
    "dora": peft.LoraConfig(target_modules=["c_attn", "c_proj"], use_dora=True, **LORA),
    "lora and a trained norm": peft.LoraConfig(target_modules=["c_fc"], modules_to_save=["ln_f"], **LORA),
    "ia3": peft.IA3Config(
        target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True,
        init_ia3_weights=False,
    ),
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}  # fmt: skip
MERGED = ("lora", "lora of all", "rank stabilised", "dora", "ia3")


def wrapped(name: str) -> Trio:
    models = []
    for model in trio(tie_word_embeddings=False):
        torch.manual_seed(3)
        models.append(peft.get_peft_model(model, VARIANTS[name]).eval())
    found = Trio(*models)
    found.truth.double()
    with torch.no_grad():  # the same float32 adapters in each of the three models
        for name, parameter in found.truth.named_parameters():
            parameter.copy_(found.plain.get_parameter(name))
    return found


@pytest.mark.parametrize("name", VARIANTS)
def test_adapter(name):
    models = wrapped(name)
    before = trio(tie_word_embeddings=False).ours(IDS, output_hidden_states=True)
    found = same(models, input_ids=IDS, attention_mask=padded())
    assert not torch.allclose(found.logits[:, -9:], before.logits)
    generates_the_same(models)
    for model in models:
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
    same_gradients(models)
    if name not in ("prompt tuning", "prefix tuning"):
        assert "peft" in str(gpt2fast.report(models.ours).reasons)
    with models.ours.disable_adapter(), models.plain.disable_adapter(), models.truth.disable_adapter():
        found = same(models, input_ids=IDS, output_hidden_states=True)
        assert all(map(torch.equal, found.hidden_states, before.hidden_states))
        if name != "lora of all":  # its head is PyTorch's linear, whatever the adapter
            assert torch.equal(found.logits, before.logits)
        generates_the_same(models)


@pytest.mark.parametrize("name", MERGED)
def test_merged(name):
    models = wrapped(name)
    before = trio(tie_word_embeddings=False).ours(IDS).logits
    merged = Trio(*(model.merge_and_unload() for model in models))
    same(merged, IDS, attention_mask=padded())
    generates_the_same(merged)
    assert not torch.allclose(merged.ours(IDS).logits, before)
    assert type(merged.ours) is gpt2fast.GPT2LMHeadModel and gpt2fast.report(merged.ours).reasons == {}


def test_saved_and_loaded_across(tmp_path):
    """An adapter trained on our model, loaded on transformers' and on ours."""
    models = wrapped("lora")
    models.ours.save_pretrained(tmp_path)
    fresh = trio(tie_word_embeddings=False)
    loaded = Trio(*(peft.PeftModel.from_pretrained(model, tmp_path).eval() for model in fresh))
    loaded.truth.double()
    found = same(loaded, input_ids=IDS, attention_mask=padded())
    assert torch.equal(found.logits, models.ours(input_ids=IDS, attention_mask=padded()).logits)
    generates_the_same(loaded)


def test_optimize_after_the_adapter():
    """A model that is wrapped already: the modules that PEFT keeps inside are switched too."""
    models = wrapped("lora")
    gpt2fast.restore(models.ours)
    assert torch.equal(models.ours(input_ids=IDS).logits, models.plain(input_ids=IDS).logits)
    assert gpt2fast.optimize(models.ours) is models.ours
    inner = models.ours.base_model.model.transformer.h[0]
    assert type(inner).__module__ == "gpt2fast.hf.blocks" == type(inner.mlp.c_fc.base_layer).__module__
    same(models, input_ids=IDS, attention_mask=padded())
    generates_the_same(models)


def test_two_adapters():
    models = wrapped("lora")
    for model in models[:2]:
        torch.manual_seed(8)
        model.add_adapter("other", VARIANTS["lora"])
    texts = []
    for name in ("default", "other", "default"):
        for model in models[:2]:
            model.set_adapter(name)
        texts.append(generates_the_same(models))
    assert not torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


def test_an_adapter_that_names_no_task_is_saved_as_one_of_transformers(tmp_path):
    """Without a task, PEFT saves the base model's class and module, and AutoPeftModel loads the model by them."""
    ours = gpt2fast.optimize(copy.deepcopy(trio().plain))
    ours.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(ours, peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False))
    adapted.base_model.model.name_or_path = str(tmp_path / "base")
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    for file in tmp_path.rglob("*.json"):
        assert "gpt2fast" not in file.read_text()
    ids = torch.randint(0, ours.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    loaded = peft.AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(ids).logits, adapted.eval()(ids).logits)


def test_our_classes_pickle_as_themselves():
    for kind in (gpt2fast.GPT2LMHeadModel, gpt2fast.GPT2Model, Mine):
        assert pickle.loads(pickle.dumps(kind)) is kind
    assert gpt2fast.GPT2LMHeadModel.__module__ == "transformers.models.gpt2.modeling_gpt2" != Mine.__module__


class Mine(gpt2fast.GPT2LMHeadModel):
    """A user's own subclass."""
