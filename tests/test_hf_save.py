"""Loading, saving, resizing and tying, as in transformers' common model checks, and importing without transformers."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from hf_models import CLASSES, config, one_thread, padded, same, tokens, trio  # noqa: F401

import gpt2fast

IDS = tokens()


@pytest.mark.parametrize("kind", CLASSES)
def test_save_and_load_both_ways(kind, tmp_path):
    ours = getattr(gpt2fast, kind)(config(pad_token_id=0)).eval()
    ours.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [kind]
    theirs = getattr(transformers, kind).from_pretrained(tmp_path / "ours")
    assert type(theirs) is getattr(transformers, kind)
    state = ours.state_dict()
    assert theirs.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())
    theirs.save_pretrained(tmp_path / "theirs")
    back = getattr(gpt2fast, kind).from_pretrained(tmp_path / "theirs", dtype=torch.bfloat16)
    assert type(back) is getattr(gpt2fast, kind) and back.dtype == torch.bfloat16 and not back.training
    assert all(torch.equal(value, state[name].bfloat16()) for name, value in back.state_dict().items())
    loaded, info = getattr(gpt2fast, kind).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded(IDS)[0], ours(IDS)[0])
    assert set(gpt2fast.report(loaded).reasons) <= {"score", "classifier", "qa_outputs", "multiple_choice_head"}


def test_base_and_head_checkpoints_fit_each_other(tmp_path):
    models = trio()
    models.plain.transformer.save_pretrained(tmp_path / "base")
    models.plain.save_pretrained(tmp_path / "head")
    base = gpt2fast.GPT2Model.from_pretrained(tmp_path / "head").eval()
    head = gpt2fast.GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(base(IDS)[0], models.ours.transformer(IDS)[0])
    assert torch.equal(head(IDS)[0], models.ours(IDS)[0])
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "head")) is transformers.GPT2LMHeadModel


def test_eager_at_loading(tmp_path):
    trio().plain.save_pretrained(tmp_path)
    ours = gpt2fast.GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert len(ours(IDS, output_attentions=True).attentions) == 2
    assert "eager" in gpt2fast.report(ours)["transformer.h.0.attn"].reason


@pytest.mark.parametrize("tied", (True, False))
def test_resized_embeddings(tied):
    def change(model):
        torch.manual_seed(1)
        model.resize_token_embeddings(250, mean_resizing=False)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(2)
            for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                table.weight[211:] = torch.randn(39, 64, generator=generator)

    models = trio(tie_word_embeddings=tied).apply(change)
    assert (models.ours.lm_head.weight is models.ours.transformer.wte.weight) is tied
    assert same(models, IDS + 39).logits.shape == (3, 9, 250)
    models.ours.generation_config.pad_token_id = models.plain.generation_config.pad_token_id = 0
    assert torch.equal(*(m.generate(IDS + 39, max_new_tokens=6, do_sample=False) for m in models[:2]))
    models.apply(lambda model: model.resize_token_embeddings(100, mean_resizing=False))
    same(models, IDS % 100)


def test_tied_weights_stay_tied_through_training_and_dtype():
    models = trio()
    ours = models.ours
    assert ours.lm_head.weight is ours.transformer.wte.weight
    ours.to(torch.bfloat16)
    assert ours.lm_head.weight is ours.transformer.wte.weight
    ours(IDS, labels=IDS).loss.backward()
    assert ours.lm_head.weight.grad is ours.transformer.wte.weight.grad


def test_new_embedding_modules_are_used():
    def change(model):
        torch.manual_seed(4)
        table = torch.nn.Embedding(211, 64, dtype=torch.float32, padding_idx=0).to(model.dtype)
        model.set_input_embeddings(table)

    models = trio(tie_word_embeddings=False).apply(change)
    same(models, IDS, attention_mask=padded())
    assert "padding_idx" in gpt2fast.report(models.ours)["transformer.wte"].reason


def test_initial_weights_are_drawn_as_in_transformers():
    torch.manual_seed(0)
    plain = transformers.GPT2LMHeadModel(config())
    torch.manual_seed(0)
    ours = gpt2fast.GPT2LMHeadModel(config())
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in plain.state_dict().items())


def test_bad_token_count_is_named():
    with pytest.raises(ValueError, match=r"positions must lie in \[0, 48\)"):
        trio().ours(tokens(1, 60))


def test_without_transformers():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import gpt2fast\n"
        "try: gpt2fast.GPT2LMHeadModel\n"
        "except ImportError as error: print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "gpt2fast[transformers]"' in found.stdout


def test_importing_the_drop_in_leaves_transformers_alone():
    code = (
        "import transformers.models.gpt2.modeling_gpt2 as m, torch\n"
        "before = {k: id(v) for k, v in vars(m).items()}, id(torch.nn.LayerNorm.forward)\n"
        "import gpt2fast.hf\n"
        "assert before == ({k: id(v) for k, v in vars(m).items()}, id(torch.nn.LayerNorm.forward))\n"
        "assert not torch.nn.modules.module._has_any_global_hook()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
