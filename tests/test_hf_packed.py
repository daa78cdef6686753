"""Packed weights in the drop-in: the numbers of the native model, its generate, the report, files, and refusals."""

import warnings

import pytest
import torch
from transformers import GPT2Config
from transformers import GPT2LMHeadModel as Stock

import gpt2fast
from gpt2fast import GPT2, GPT2LMHeadModel

SIZES = dict(n_embd=48, n_layer=2, n_head=4, n_positions=64, vocab_size=331, eos_token_id=330, bos_token_id=330)


@pytest.fixture(scope="module", params=(True, False), ids=("tied", "own head"))
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    model = Stock(GPT2Config(**SIZES, tie_word_embeddings=request.param)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return path


@pytest.fixture(params=("int8", "int4"))
def weights(request):
    return request.param


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 330, shape, generator=torch.Generator().manual_seed(0))


def logits(model, ids):
    with torch.inference_mode():
        found = model(ids)
    return getattr(found, "logits", found)


def test_the_numbers_of_the_native_model(folder, weights):
    native, model = (
        GPT2.from_pretrained(folder, weights=weights),
        GPT2LMHeadModel.from_pretrained(folder, weights=weights),
    )
    assert torch.equal(logits(model, tokens(3, 20)), logits(native, tokens(3, 20)))
    with torch.inference_mode():
        loss = model(tokens(3, 20), labels=tokens(3, 20)).loss
        expected = native(tokens(3, 20)[:, :-1], targets=tokens(3, 20)[:, 1:])
    assert abs(loss - expected) <= 2 * torch.finfo(torch.float32).eps * expected  # two means, summed in another order


@pytest.mark.parametrize("padded", (False, True))
def test_generate_is_the_native_loop(folder, weights, padded):
    native, model = (
        GPT2.from_pretrained(folder, weights=weights),
        GPT2LMHeadModel.from_pretrained(folder, weights=weights),
    )
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, :3] = 1 - padded
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = model.generate(tokens(3, 7), attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=330)
    assert not [w for w in said if "gpt2fast" in str(w.message)]
    assert torch.equal(found, native.generate(tokens(3, 7), mask, max_new_tokens=9, pad_token_id=330))


def test_report(folder, weights):
    """Every part runs an op of ours, fused as with other weights."""
    report = gpt2fast.report(GPT2LMHeadModel.from_pretrained(folder, weights=weights))
    assert report.reasons == {}
    ops = {line.name.removeprefix("transformer."): (line.op, line.fused) for line in report}
    assert ops["wte"][0] == "int8_embedding" and ops["lm_head"][0] == "int8_linear"
    assert ops["h.1.attn.c_attn"] == (f"{weights}_linear", None)
    assert ops["h.1.mlp.c_fc"] == (f"{weights}_linear", "gelu_tanh")
    assert ops["h.1.mlp.c_proj"] == (f"{weights}_linear", "residual")


def test_hooks_are_called(folder, weights):
    """A hook on a layer runs in forward, and generate leaves the native loop for it."""
    model, seen = GPT2LMHeadModel.from_pretrained(folder, weights=weights), []
    expected = model.generate(tokens(1, 5), max_new_tokens=4, do_sample=False)
    model.transformer.h[1].mlp.c_proj.register_forward_hook(lambda *args: seen.append(1))
    assert torch.equal(model.generate(tokens(1, 5), max_new_tokens=4, do_sample=False), expected)
    assert len(seen) == 4
    assert "hook" in str(gpt2fast.report(model)["transformer.h.1.mlp.c_proj"].reason)


@pytest.mark.parametrize("mmap", (False, True))
def test_saved_and_loaded(folder, weights, mmap, tmp_path):
    model = GPT2LMHeadModel.from_pretrained(folder, weights=weights)
    model.save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path, weights=weights, mmap=mmap)
    native = GPT2.from_pretrained(tmp_path)
    for other in (again, native):
        assert torch.equal(logits(other, tokens(1, 9)), logits(model, tokens(1, 9)))


def test_saved_as_floats(folder, weights, tmp_path):
    """transformers reads them, and packing them again gives the same model."""
    model = GPT2LMHeadModel.from_pretrained(folder, weights=weights)
    model.save_pretrained(tmp_path, unpack=True)
    stock = Stock.from_pretrained(tmp_path)
    error = (logits(stock, tokens(1, 9)) - logits(model, tokens(1, 9))).square().mean().sqrt()
    assert error < logits(model, tokens(1, 9)).std() / 127


@pytest.mark.parametrize("name, dtype", [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_formats_that_are_not_packed(folder, name, dtype):
    assert GPT2LMHeadModel.from_pretrained(folder, weights=name).dtype == dtype


REFUSED = {
    "must stay float32 on the CPU, got bfloat16": lambda model: model.bfloat16(),
    "is for inference and has no gradients": lambda model: model.requires_grad_(),
    "cannot be resized; load it with weights='float32'": lambda model: model.resize_token_embeddings(400),
    "wte.weight must be packed, uint8": lambda model: model.load_state_dict(
        {name: torch.zeros(1) for name in model.state_dict()}
    ),
    "is saved without other options": lambda model: model.save_pretrained("unused", max_shard_size="1GB"),
}


@pytest.mark.parametrize("said", REFUSED)
def test_refused(folder, weights, said):
    model = GPT2LMHeadModel.from_pretrained(folder, weights=weights)
    before = logits(model, tokens(1, 9))
    with pytest.raises((TypeError, ValueError), match=said):
        REFUSED[said](model)
    assert torch.equal(logits(model, tokens(1, 9)), before) and not any(p.requires_grad for p in model.parameters())


def test_adapters_are_refused(folder, weights):
    peft = pytest.importorskip("peft")
    model = GPT2LMHeadModel.from_pretrained(folder, weights=weights)
    with pytest.raises(ValueError, match="for inference, load the model with"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"]))


def test_options_that_do_not_go_with_packed_weights(folder):
    with pytest.raises(TypeError, match="the options must be revision, token, cache_dir, got dtype"):
        GPT2LMHeadModel.from_pretrained(folder, weights="int8", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="weights must be one of float32, .* got 'int3'"):
        GPT2LMHeadModel.from_pretrained(folder, weights="int3")
    with pytest.raises(ValueError, match="mmap must come with weights="):
        GPT2LMHeadModel.from_pretrained(folder, mmap=True)


def test_cross_attention_is_refused(folder, tmp_path):
    Stock(GPT2Config(**SIZES, add_cross_attention=True)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gpt2fast"):
        GPT2LMHeadModel.from_pretrained(tmp_path, weights="int8")
