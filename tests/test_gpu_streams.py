"""Rehearses the stage of ``make gpu`` that checks streams, devices and graphs. CI rehearses it for all ops."""

import pytest

pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")
pytest.importorskip("triton")

from gpt2fast.benchmarks import gpu_stages, gpu_streams
from gpt2fast.op import OPS

WHERE = gpu_stages.Where(rehearse=True)


@pytest.mark.parametrize("name", ("gelu", "adamw_", "linear_backward"))
def test_rehearsal(name):
    found = gpu_streams.compare(WHERE, OPS[name], "triton", gpu_stages.smallest(OPS[name]))
    assert found == dict(what="side stream, graph")


@pytest.mark.parametrize("name", ("gelu", "adamw_"))
def test_a_kernel_that_reads_before_its_arguments_are_written_is_found(name, monkeypatch):
    """Acts as if the kernel ran on another stream: what is copied does not arrive in time."""
    op = OPS[name]
    monkeypatch.setattr(gpu_streams, "copy", lambda source, into: None)
    with pytest.raises(AssertionError, match="output 0 on a side stream, beside the default stream's"):
        gpu_streams.compare(WHERE, op, "triton", gpu_stages.smallest(op))
    monkeypatch.setattr(gpu_streams, "on_a_side_stream", lambda where, op, args: gpu_streams.results(op, args))
    with pytest.raises(AssertionError, match="output 0 in a graph, beside the default stream's"):
        gpu_streams.compare(WHERE, op, "triton", gpu_stages.smallest(op))
