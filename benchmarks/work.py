"""What a call moves, computes and allocates: the bytes that it must read and write, its operations, its peak memory."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gpt2fast.op import Op

from . import cases, modes


@dataclass
class Work:
    read: int  # bytes, as written
    written: int
    flops: int  # operations

    def __add__(self, other: "Work") -> "Work":
        return Work(self.read + other.read, self.written + other.written, self.flops + other.flops)


def work_of(op: Op, case: dict, args: dict, mode: str) -> Work:
    """The least bytes that the passes of ``mode`` move, with every tensor once, and the operations that they compute.

    A backward pass reads what the forward pass kept for it and the gradients of the outputs. It writes the gradients of
    the inputs. Its operations are those that the ops which it calls declare.
    """
    forward = Work(*cases.nbytes(op, args), int(op.flops(case)) if op.flops else 0)
    if mode == "fwd":
        return forward
    backward = _backward(op, args)
    return backward if mode == "bwd" else forward + backward


def _backward(op: Op, args: dict) -> Work:
    kept: dict[tuple, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr(), tensor.shape, tensor.stride()] = tensor.nbytes
        return tensor

    given, leaves = modes.with_leaves(tuple(args.values()))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = modes.outputs(op, op, given)
    grads = [torch.ones_like(o) for o in outputs]
    with FlopCounterMode(display=False) as counter:
        made = torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
    read = sum(kept.values()) + sum(g.nbytes for g in grads)
    return Work(read, sum(g.nbytes for g in made if g is not None), counter.get_total_flops())


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes of CPU memory that a call holds at once, including its results, beyond what was held before.

    torch.profiler counts what PyTorch's allocator and ours hand out and take back.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it prints a line at each start and stop
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as found:
        result = call()
    del result  # it was held until here
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
