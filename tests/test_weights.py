"""Checkpoints are read as transformers writes them and written as it reads them. What does not fit is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gpt2fast import memory
from gpt2fast import safetensors as ours
from gpt2fast.config import Config
from gpt2fast.model import GPT2

SIZES = dict(n_layer=2, n_embd=32, n_head=2, vocab_size=97, n_positions=24, bos_token_id=0, eos_token_id=0)


@pytest.fixture
def hf() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**SIZES)).eval()


def same(model: GPT2, hf) -> None:
    expected = {n.removeprefix("transformer."): t for n, t in hf.state_dict().items() if n != "lm_head.weight"}
    if not model.config.tie_word_embeddings:
        expected["lm_head.weight"] = hf.lm_head.weight
    found = model.state_dict()
    assert set(found) == set(expected) and all(torch.equal(found[n], expected[n]) for n in expected)


def rewrite(folder, change) -> None:
    """Applies ``change`` to the tensors of folder's model.safetensors."""
    path = folder / "model.safetensors"
    tensors = change(safetensors.torch.load_file(path))
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trips_are_bit_equal(tmp_path, dtype, tied):
    hf = GPT2LMHeadModel(GPT2Config(**SIZES, tie_word_embeddings=tied)).to(dtype)
    hf.save_pretrained(tmp_path / "theirs")
    model = GPT2.from_pretrained(tmp_path / "theirs")
    same(model, hf)
    model.save_pretrained(tmp_path / "ours")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    assert again.dtype == dtype and again.config.tie_word_embeddings == tied
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in hf.state_dict().items())
    same(GPT2.from_pretrained(tmp_path / "ours"), hf)
    with safetensors.safe_open(tmp_path / "ours" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_unknown_config_keys_survive(tmp_path, hf):
    hf.config.surprise = {"a": [1]}
    hf.save_pretrained(tmp_path / "a")
    GPT2.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["surprise"] == {"a": [1]}


@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_weights_argument(tmp_path, hf, wanted):
    hf.save_pretrained(tmp_path)
    same(GPT2.from_pretrained(tmp_path, weights=wanted), hf.to(getattr(torch, wanted)))


def test_sharded(tmp_path, hf):
    hf.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    same(GPT2.from_pretrained(tmp_path), hf)


@pytest.mark.parametrize("legacy", [False, True])
def test_bin(tmp_path, hf, legacy):
    hf.config.save_pretrained(tmp_path)
    torch.save(hf.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    same(GPT2.from_pretrained(tmp_path), hf)


def test_sharded_bin(tmp_path, hf):
    hf.config.save_pretrained(tmp_path)
    names = sorted(set(hf.state_dict()) - {"lm_head.weight"})
    weight_map = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({n: hf.state_dict()[n] for n in names if weight_map[n] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    same(GPT2.from_pretrained(tmp_path), hf)


def test_old_names_buffers_and_tied_copies(tmp_path, hf):
    hf.save_pretrained(tmp_path)

    def old(tensors):
        tensors = {n.removeprefix("transformer."): t for n, t in tensors.items()}
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 24, 24).bool()
        tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)
        return tensors | {"lm_head.weight": tensors["wte.weight"].clone()}

    rewrite(tmp_path, old)
    same(GPT2.from_pretrained(tmp_path), hf)


def test_base_model_and_file_of_another_dtype_per_tensor(tmp_path, hf):
    hf.transformer.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: {n: t.double() if n == "ln_f.bias" else t for n, t in tensors.items()})
    same(GPT2.from_pretrained(tmp_path), hf)


@pytest.mark.parametrize("dropped, added, message", [
    (["ln_f.bias"], {}, "missing: ln_f.bias"),
    ([], {"extra": torch.ones(1)}, "surplus: extra"),
    (["ln_f.bias", "wte.weight"], {"a": torch.ones(1)}, "missing: ln_f.bias, wte.weight; surplus: a"),
    ([], {"transformer.wpe.weight": torch.ones(23, 32)}, r"wpe.weight must be \(24, 32\), got \(23, 32\)"),
    ([], {"lm_head.weight": torch.ones(97, 32)}, "lm_head.weight .* must equal wte.weight"),
    ([], {"transformer.ln_f.bias": torch.ones(32).long()}, "ln_f.bias .* floating-point"),
])  # fmt: skip
def test_weights_that_do_not_fit(tmp_path, hf, dropped, added, message):
    hf.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: {n: v for n, v in t.items() if n.split(".", 1)[1] not in dropped} | added)
    with pytest.raises((ValueError, TypeError), match=message):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.parametrize("change, message", [
    (dict(n_layer=3), "missing: h.2.attn.c_attn.bias"),
    (dict(n_layer=1), "surplus: h.1.attn.c_attn.bias"),
    (dict(n_embd=34), r"wte.weight must be \(97, 34\), got \(97, 32\).* and 20 more"),
    (dict(tie_word_embeddings=False), "missing: lm_head.weight"),
    (dict(n_head=5), "n_embd must be a multiple of n_head = 5"),
])  # fmt: skip
def test_config_that_does_not_fit(tmp_path, hf, change, message):
    hf.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        GPT2.from_pretrained(tmp_path)


def test_an_unknown_dtype_of_what_is_no_weight_is_no_matter(tmp_path, hf):
    """Old checkpoints have masks as buffers. The model makes its masks itself."""
    hf.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {n: t.clone() for n, t in hf.transformer.state_dict().items()} | {"h.0.attn.bias": torch.ones(4).bool()}
    ours.write(path, tensors)
    path.write_bytes(path.read_bytes().replace(b'"BOOL"', b'"BITS"'))
    same(GPT2.from_pretrained(tmp_path), hf)
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F31"', 1))
    with pytest.raises(TypeError, match="has dtype 'F31'"):
        GPT2.from_pretrained(tmp_path)


def test_more_layers_than_tensors_are_refused_before_a_layer_is_built(tmp_path, hf):
    hf.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    tensors = len(ours.read(tmp_path / "model.safetensors"))

    def no_block(config, layer):
        pytest.fail("a layer was built")

    for n_layer, message in ((tensors + 1, f"at most their {tensors} tensors, got {tensors + 1}"), (10**9, "10000")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"n_layer": n_layer}))
        with pytest.raises(ValueError, match=f"n_layer must be .*{message}"):
            GPT2.from_pretrained(tmp_path, block=no_block)
    with pytest.raises(ValueError, match="the given state: n_layer must be at most their 1 tensors, got 2"):
        GPT2.from_state(Config(n_layer=2), {"wte.weight": torch.ones(1)}, no_block)


def test_truncated_checkpoint_is_refused_before_a_weight_is_read(tmp_path, hf, monkeypatch):
    hf.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size - 5)
    monkeypatch.setattr(memory, "empty", lambda *a: pytest.fail("memory was asked for"))
    with pytest.raises(ValueError, match="truncated"):
        GPT2.from_pretrained(tmp_path)


def test_corrupt_bin_json_and_index(tmp_path, hf):
    hf.config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="must hold one of model.safetensors"):
        GPT2.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="pytorch_model.bin cannot be read as weights"):
        GPT2.from_pretrained(tmp_path)
    torch.save([1], tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must hold a dict of tensors"):
        GPT2.from_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for content, message in (
        ("{}", "weight_map"),
        ("[", "weight_map"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "own folder"),
        ('{"weight_map": {"a": "x.safetensors"}}', "names x.safetensors, which is missing"),
    ):
        index.write_text(content)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            GPT2.from_pretrained(tmp_path)
    ours.write(tmp_path / "x.safetensors", {"b": torch.ones(1)})
    with pytest.raises(ValueError, match="missing: a"):
        GPT2.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        GPT2.from_pretrained(tmp_path)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_a_bin_file_cannot_run_code(tmp_path, hf, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hf.config.save_pretrained(tmp_path)
    torch.save({"x": Malicious()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        GPT2.from_pretrained(tmp_path)
    assert not (tmp_path / "hacked").exists()


def test_arguments(tmp_path, hf, monkeypatch):
    with pytest.raises(ValueError, match="weights must be one of float32, bfloat16, float16, int8, int4, got 'int3'"):
        GPT2.from_pretrained(tmp_path, weights="int3")
    with pytest.raises(FileNotFoundError, match="a folder or a hub name, got"):
        GPT2.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="config.json"):
        GPT2.from_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub"):
        GPT2.from_pretrained("no/such-model")


def test_hub_names_are_fetched(tmp_path, hf, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(name, allow_patterns, **where):
        asked.append((name, "pytorch_model*" in allow_patterns))
        if len(asked) > 1:
            torch.save(hf.state_dict(), tmp_path / "pytorch_model.bin")
        hf.config.save_pretrained(tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    same(GPT2.from_pretrained("someone/gpt2"), hf)
    assert asked == [("someone/gpt2", False), ("someone/gpt2", True)]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: 1 / 0)
    with pytest.raises(OSError, match="'gone' is no folder here and could not be fetched"):
        GPT2.from_pretrained("gone")


def test_saving_loses_nothing_when_it_fails(tmp_path, hf, monkeypatch):
    model = GPT2.from_transformers(hf)
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(Config, "to_json", lambda self: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="cannot save to .*disk full"):
        model.save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot save to .*file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(OSError, match="cannot save to .*file"):
        model.save_pretrained(tmp_path / "file" / "below")


def test_a_folder_that_may_not_be_written(tmp_path, hf):
    model, folder = GPT2.from_transformers(hf), tmp_path
    if os.geteuid() == 0:  # root may write everywhere except in the kernel's own folders
        folder = Path("/proc/self")
    else:
        folder.chmod(0o500)
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(OSError, match=f"gpt2fast: cannot save to {folder}"):
        model.save_pretrained(folder)
    with pytest.raises(OSError, match=f"gpt2fast: cannot save to {folder}"):
        model.save_pretrained(folder / "below")
    assert sorted(path.name for path in folder.iterdir()) == before


def test_memory_is_aligned_and_each_tensor_its_own(tmp_path):
    shapes = {"a": (3, 5), "b": (0,), "c": (1 << 20,), "d": ()}
    tensors = memory.empty(shapes, torch.float32)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == shapes
    assert all(t.data_ptr() % memory.ALIGNMENT == 0 for t in tensors.values() if t.numel())
    for value, tensor in enumerate(tensors.values()):
        tensor.fill_(value)
    assert all((tensor == value).all() for value, tensor in enumerate(tensors.values()))
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")  # it refuses tensors that share storage


PEAK = """
import json, resource, sys
import torch
bare = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if len(sys.argv) > 1:
    from gpt2fast.model import GPT2
    model = GPT2.from_pretrained(sys.argv[1])
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=20, eos_token_id=[])
print(json.dumps([bare, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def peak(*args: str) -> int:
    """Peak resident memory above a bare ``import torch``, in bytes."""
    out = subprocess.run([sys.executable, "-c", PEAK, *args], check=True, capture_output=True, text=True).stdout
    bare, most = json.loads(out)
    return (most - bare) * (1 if sys.platform == "darwin" else 1024)


def test_memory_of_a_float32_decode(tmp_path):
    """Measures two sizes, so that the memory of code and threads does not count as that of the weights."""
    needed = []
    for n_layer in (2, 6):
        model = GPT2(Config(n_layer=n_layer, vocab_size=20_000))
        model.save_pretrained(tmp_path)
        size = sum(p.numel() * 4 for p in model.parameters())
        del model
        needed.append((size, peak(str(tmp_path))))
    (small, small_peak), (large, large_peak) = needed
    print(f"{small / 2**20:.0f} MiB need {small_peak / 2**20:.0f}, {large / 2**20:.0f} need {large_peak / 2**20:.0f}")
    assert large_peak - small_peak <= 1.15 * (large - small)
