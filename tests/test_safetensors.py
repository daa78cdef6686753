"""The safetensors format: reading, writing, and the files that are refused."""

import json
import os
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from gpt2fast import safetensors as ours


def test_blocks_larger_than_one_read(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "BLOCK", 64)
    tensor = torch.randn(33, 7)
    ours.write(tmp_path / "a.safetensors", {"x": tensor})
    out = torch.empty(33, 7, dtype=torch.bfloat16)
    ours.read(tmp_path / "a.safetensors")["x"].copy_to(out)
    assert torch.equal(out, tensor.bfloat16())


def test_a_dtype_that_the_format_lacks_is_named_before_the_file_is_touched(tmp_path):
    path = tmp_path / "a.safetensors"
    ours.write(path, {"x": torch.ones(2)})
    with pytest.raises(TypeError, match="write: y must have one of the dtypes float64, .*, bool, got complex64"):
        ours.write(path, {"x": torch.zeros(2), "y": torch.zeros(2, dtype=torch.complex64)})
    assert torch.equal(safetensors.torch.load_file(path)["x"], torch.ones(2))


HEADER = {
    "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "y": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
}


def file_of(header, data=b"\0" * 16, length=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def changed(name, **changes) -> dict:
    return HEADER | {name: HEADER["x" if name not in HEADER else name] | changes}


CORRUPT = {
    "empty": (b"", "0 bytes, too few"),
    "short": (b"\1\2\3", "3 bytes, too few"),
    "long header": (file_of(HEADER, length=1 << 40), "header would have"),
    "cut header": (file_of(HEADER)[:30], "ends beyond its 30 bytes"),
    "no json": (file_of(b"{nonsense"), "not JSON"),
    "no utf-8": (file_of(b"\xff\xfe{}"), "not JSON"),
    "nested": (file_of(b"[" * 100_000), "not JSON"),
    "a list": (file_of(b"[]"), "not a JSON object"),
    "twice": (file_of(b'{"x": 1, "x": 2}'), "a key occurs twice"),
    "entry": (file_of({"x": 3}), "entry of x"),
    "dtype": (file_of(changed("y", dtype=31)), "y has dtype 31"),
    "dimensions": (file_of(changed("y", shape=[3] * 1_000_000)), r"y has shape \[3, 3, .*\.\.\.$"),
    "a number of many digits": (file_of(b'{"y": {"dtype": "F32", "shape": [1' + b"0" * 5000 + b"]}}"), "not JSON"),
    "a size beyond 64 bits": (file_of(changed("y", shape=[2**63, 0])), r"y has shape \[9223372036854775808, 0\]"),
    "offsets of an unknown dtype": (file_of(changed("y", dtype="F31", data_offsets=[16, 8])), "data_offsets"),
    "shape": (file_of(changed("y", shape=[-2])), r"y has shape \[-2\]"),
    "shape type": (file_of(changed("y", shape=[2.0])), "y has shape"),
    "offsets": (file_of(changed("y", data_offsets=[8])), "y has data_offsets"),
    "offsets turned": (file_of(changed("y", data_offsets=[16, 8])), "y needs 8 bytes, its data_offsets span -8"),
    "size": (file_of(changed("y", shape=[3])), "y needs 12 bytes, its data_offsets span 8"),
    "overlap": (file_of(changed("y", data_offsets=[4, 12]), b"\0" * 12), "y overlaps"),
    "gap": (file_of(changed("y", data_offsets=[12, 20]), b"\0" * 20), "4 bytes before y"),
    "rest": (file_of(HEADER, b"\0" * 17), "1 bytes at its end"),
    "truncated": (file_of(HEADER)[:-1], "y ends beyond the file"),
    "metadata": (file_of(HEADER | {"__metadata__": 3}), "metadata"),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_corrupt_safetensors(tmp_path, name):
    content, message = CORRUPT[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"model.safetensors is not a valid safetensors file: .*{message}"):
        ours.read(path)


def test_an_unknown_dtype_refuses_only_its_own_tensor(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(changed("y", dtype="F8_E8M0")))
    found = ours.read(path)
    out = torch.empty(found["x"].shape, dtype=found["x"].dtype)
    found["x"].copy_to(out)
    for use in (lambda: found["y"].copy_to(out), lambda: next(found["y"].blocks())):
        with pytest.raises(TypeError, match=r"y of .*model.safetensors has dtype 'F8_E8M0', none of F64, "):
            use()


def test_a_file_that_takes_the_place_of_another_is_not_read(tmp_path):
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    ours.write(path, {"x": torch.zeros(5)})
    ours.write(other, {"x": torch.ones(5)})
    found, out = ours.read(path)["x"], torch.full((5,), 7.0)
    other.replace(path)
    found.copy_to(out)
    assert torch.equal(out, torch.zeros(5))
    (block,) = found.blocks()
    assert torch.equal(block, torch.zeros(5))
    os.truncate(path, 0)
    with pytest.raises(ValueError, match="not a valid safetensors file: it has 0 bytes"):
        ours.read(path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    ours.write(path, {"x": torch.zeros(5)})
    found = ours.read(path)["x"]
    os.truncate(path, path.stat().st_size - 4)
    with pytest.raises(ValueError, match="a.safetensors ended while it was read"):
        found.copy_to(torch.empty(5))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in the Linux way")
def test_files_are_closed_with_their_last_tensor(tmp_path):
    path = tmp_path / "a.safetensors"
    ours.write(path, {"x": torch.zeros(5), "y": torch.zeros(5)})
    before = len(os.listdir("/proc/self/fd"))
    found = ours.read(path)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del found["x"]
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del found["y"]
    assert len(os.listdir("/proc/self/fd")) == before
