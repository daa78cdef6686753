"""Wrappers that ask torch.cuda about the device get answers on the PTX machine, and nothing of these stays behind."""

import pytest
import torch

from gpt2fast.testing import ptx

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")


def state() -> dict:
    return {**vars(torch.cuda), "raw": getattr(torch._C, "_cuda_getCurrentRawStream", None)}


def add(x, y):
    """A usual wrapper: it takes the tensors' device, and starts as many programs as that has multiprocessors."""
    import tutorials

    assert torch.cuda.is_available() and torch.cuda.get_device_capability(x.device) >= (8, 0)
    with torch.cuda.device(x.device):
        out = torch.empty_like(x)
        count = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
        block = 32 if x.numel() < 32 * count else 128
        grid = (-(-x.numel() // block),)
        kernel = tutorials.add_kernel.warmup(x, y, out, x.numel(), BLOCK=block, grid=grid)
        kernel._init_handles()
        assert 0 < kernel.n_regs < 256
        with torch.cuda.stream(torch.cuda.current_stream()):
            kernel = tutorials.add_kernel[grid](x, y, out, x.numel(), BLOCK=block)
    torch.cuda.synchronize()
    return out


@pytest.mark.skipif(torch.cuda.is_available(), reason="the wrapper runs on the GPU")
def test_a_wrapper():
    pytest.importorskip("triton", reason="triton is not installed")
    x, y = torch.randn(300), torch.randn(300)
    with ptx.machine() as m:
        with pytest.raises(AssertionError):
            add(x, y)
        with ptx.torch_cuda():
            assert torch.equal(add(x, y), x + y)
    assert m.launches[0].grid == (10, 1, 1)


def test_everything_is_restored():
    before = state()
    with ptx.torch_cuda():
        assert torch.cuda.device_count() == 1 and torch.cuda.current_device() == 0
        with ptx.torch_cuda():
            assert torch.cuda.get_device_name() == "gpt2fast PTX machine (sm_80)"
        assert torch.cuda.current_stream().cuda_stream == 0
    with pytest.raises(KeyError), ptx.torch_cuda():
        raise KeyError
    after = state()
    assert before.keys() == after.keys() and all(after[k] is before[k] for k in before)


def test_no_time_passes():
    with ptx.torch_cuda():
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(), end.record(torch.cuda.current_stream())
        assert start.elapsed_time(end) == 0
