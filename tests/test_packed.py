"""Models with packed weights: made from a checkpoint or a model, saved, mapped, and refused where they cannot serve."""

import json
import shutil

import pytest
import torch

from gpt2fast import packed, packed_file, safetensors, step
from gpt2fast.config import Config
from gpt2fast.model import GPT2
from gpt2fast.packing import unpack_int4, unpack_int8

SIZES = dict(n_embd=48, n_layer=3, n_head=4, n_positions=64, vocab_size=331)
FORMATS = ("int8", "int4")


def float_model(**options) -> GPT2:
    torch.manual_seed(0)
    model = GPT2(Config(**SIZES | options)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 331, shape, generator=torch.Generator().manual_seed(seed))


def logits(model: GPT2, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids)


@pytest.fixture(params=FORMATS)
def weights(request):
    return request.param


@pytest.fixture
def folder(tmp_path):
    float_model().save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def test_the_three_ways_to_a_packed_model_agree(weights, folder, tmp_path):
    """Packed while a checkpoint is read, packed in place, and read from a packed file, mapped or not."""
    ids = tokens(2, 20)
    read = GPT2.from_pretrained(folder, weights=weights)
    expected = logits(read, ids)
    assert torch.equal(logits(packed.pack(float_model(), weights), ids), expected)
    read.save_pretrained(tmp_path / "packed")
    for given in (None, weights):
        for mmap in (False, True):
            again = GPT2.from_pretrained(tmp_path / "packed", weights=given, mmap=mmap)
            assert packed.weights_of(again) == weights and torch.equal(logits(again, ids), expected)


def test_what_is_packed(weights):
    """Every matrix but the table of positions is rounded as packing.py says; all else is as it was."""
    before, model = float_model(tie_word_embeddings=False), packed.pack(float_model(tie_word_embeddings=False), weights)
    after = packed_file.unpacked_state(model)
    assert after.keys() == before.state_dict().keys()
    for name, old in before.state_dict().items():
        if old.dim() == 1 or name == "wpe.weight":
            assert torch.equal(after[name], old)
            continue
        linear = name.startswith("h.")
        old = old.t() if linear else old
        if linear and weights == "int4":
            expected = unpack_int4(packed.pack_int4(old), *old.shape)
        else:
            expected = unpack_int8(*packed.pack_int8(old), old.shape[1])
        assert torch.equal(after[name], expected.t() if linear else expected)


def test_it_is_the_model_of_the_rounded_weights(weights):
    """Only the rounding of x to 8 bits is left: it is at most half a step of each piece."""
    model = packed.pack(float_model(), weights)
    rounded = GPT2.from_state(model.config, packed_file.unpacked_state(model))
    found, expected = logits(model, tokens(2, 20)), logits(rounded, tokens(2, 20))
    error = (found - expected).square().mean().sqrt() / expected.std()
    assert 0 < error < 1 / 127


@pytest.mark.parametrize("batch", (1, 3, 17))
def test_the_step_has_the_bits_of_the_ops(weights, batch):
    model, ids = packed.pack(float_model(), weights), tokens(batch, 12)
    caches = [model.new_cache(batch, 4) for _ in range(2)]
    with torch.inference_mode():
        assert step.obstacle(model) is None
        for cache in caches:
            model(ids[:, :5], cache=cache)
        native = step.Step(model, batch)
        for i in range(5, 12):
            found = native.logits(ids[:, i : i + 1].contiguous(), None, caches[0])
            assert torch.equal(found, model(ids[:, i : i + 1], cache=caches[1])[:, -1])


def test_a_row_does_not_depend_on_batch_or_chunks(weights):
    model, ids = packed.pack(float_model(), weights), tokens(5, 30)
    whole = logits(model, ids)
    assert torch.equal(logits(model, ids[3:4]), whole[3:4])
    cache = model.new_cache(5)
    with torch.inference_mode():
        parts = [model(ids[:, a:b], cache=cache) for a, b in ((0, 11), (11, 12), (12, 17), (17, 30))]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_generate(weights):
    model, ids = packed.pack(float_model(), weights), tokens(1, 5)
    out = model.generate(ids, max_new_tokens=20, eos_token_id=[])
    for _ in range(20):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, ids)


def test_loss(weights):
    model, ids = packed.pack(float_model(), weights), tokens(2, 20)
    with torch.inference_mode():
        loss = model(ids, targets=ids)
    assert torch.equal(loss, torch.ops.gpt2fast.cross_entropy(logits(model, ids).flatten(0, 1), ids.flatten())[0])


@pytest.mark.parametrize("head", (True, False))
def test_save_unpacked(weights, head, tmp_path):
    """transformers reads the float32 copy."""
    from transformers import GPT2LMHeadModel

    model = packed.pack(float_model(tie_word_embeddings=head), weights)
    model.save_pretrained(tmp_path, unpack=True)
    with torch.inference_mode():
        found = GPT2LMHeadModel.from_pretrained(tmp_path)(tokens(1, 9)).logits
    rounded = GPT2.from_state(model.config, packed_file.unpacked_state(model))
    assert (found - logits(rounded, tokens(1, 9))).abs().max() < (found - logits(model, tokens(1, 9))).abs().max()


REFUSED = {
    "bfloat16": lambda model: model.bfloat16(),
    "float64": lambda model: model.to(torch.float64),
    "training": lambda model: model.requires_grad_(),
    "a layer": lambda model: model.h[0].attn.c_attn.requires_grad_(),
    "floats": lambda model: model.load_state_dict(float_model().state_dict()),
    "again": lambda model: packed.pack(model, "int8"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(weights, what):
    """The error says what to do, and the model is as before."""
    model, ids = packed.pack(float_model(), weights), tokens(1, 9)
    before = logits(model, ids)
    with pytest.raises((TypeError, ValueError), match=r"load (it|the model) with|must have floating-point weights"):
        REFUSED[what](model)
    assert torch.equal(logits(model, ids), before)
    assert not any(p.requires_grad for p in model.parameters())


def test_pack_takes_native_models():
    with pytest.raises(TypeError, match=r"must be a gpt2fast.GPT2, got torch.nn.*Linear; take GPT2.from_transformers"):
        packed.pack(torch.nn.Linear(3, 4), "int8")


def test_backward_is_refused(weights):
    model = packed.pack(float_model(), weights)
    model.ln_f.weight.requires_grad_()
    loss = model(tokens(1, 9), targets=tokens(1, 9))
    with pytest.raises(RuntimeError, match="int8_linear has no derivative"):
        loss.backward()


def test_allowed(weights):
    model, other = packed.pack(float_model(), weights), packed.pack(float_model(), weights)
    before = logits(model, tokens(1, 9))
    assert model.to("cpu") is model and model.float() is model and model.requires_grad_(False) is model
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, tokens(1, 9)), before)


def damage(path, how):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if how == "cut":
        return path.write_bytes(content[:-1])
    if how == "name":
        header["h.9.x"] = header.pop("h.1.mlp.c_fc.weight")
    else:
        header["__metadata__"]["gpt2fast." + how] = dict(packed="99", byte_order="big", weights="int2")[how]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    "how, said",
    [
        ("cut", "truncated"),
        ("packed", r"must have version 1 of packed weights, got 99; pack the model again"),
        ("byte_order", r"must have byte order \w+ of packed weights, got big"),
        ("weights", "must hold int8 or int4 weights, got 'int2'"),
        ("name", "missing: h.1.mlp.c_fc.weight; surplus: h.9.x"),
    ],
)
def test_damaged_files(how, said, tmp_path):
    packed.pack(float_model(), "int8").save_pretrained(tmp_path)
    damage(tmp_path / packed_file.FILE, how)
    with pytest.raises(ValueError, match=said):
        GPT2.from_pretrained(tmp_path)


def test_formats_that_are_not_there(tmp_path, folder):
    with pytest.raises(ValueError, match="mmap needs a folder that gpt2fast pack has written"):
        GPT2.from_pretrained(folder, weights="int8", mmap=True)
    with pytest.raises(ValueError, match="pack: weights must be one of int8, int4, got 'bfloat16'"):
        packed.pack(float_model(), "bfloat16")
    packed.pack(float_model(), "int8").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights must be 'int8', as .* has them, got 'int4'"):
        GPT2.from_pretrained(tmp_path, weights="int4")
    shutil.copy(folder / "model.safetensors", tmp_path)  # now both are there
    assert packed.weights_of(GPT2.from_pretrained(tmp_path, weights="int4")) == "int4"
    assert packed.weights_of(GPT2.from_pretrained(tmp_path)) is None


def test_a_weight_that_cannot_be_packed_is_named(folder):
    model = float_model()
    model.h[1].mlp.c_fc.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"finite numbers only, got NaN or infinity \(in h.1.mlp.c_fc.weight\)"):
        packed.pack(model, "int8")


def test_nothing_is_half_written(tmp_path, monkeypatch):
    """Where writing fails, the old files are there and complete."""
    model = packed.pack(float_model(), "int8")
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(path, *args):
        path.write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(safetensors, "write", fail)
    with pytest.raises(OSError, match="cannot save to .* no space"):
        packed.pack(float_model(n_layer=1), "int4").save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
