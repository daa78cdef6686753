"""The parity rule: the error against float64 is at most twice that of plain PyTorch, plus one rounding step.

It holds for the RMS and for the maximum of the error.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..op import Op
from .inputs import build, call, every, names_of_outputs, reference, truth, work


def measure(actual: Tensor, plain: Tensor, truth: Tensor) -> dict[str, float]:
    """The errors of ``actual`` and ``plain`` against ``truth``, and the bounds of the rule.

    Infinities and NaNs must be where the truth has them. ``rms`` and ``max`` compare the rest.
    """
    rounding = torch.finfo(actual.dtype).eps
    finite = truth.isfinite()
    same_elsewhere = torch.equal(
        torch.nan_to_num(actual[~finite].double(), nan=7.0), torch.nan_to_num(truth[~finite], nan=7.0)
    )
    if not finite.any():
        return dict(rms=0.0, max=0.0, rms_bound=0.0, max_bound=0.0, fits=float(same_elsewhere))
    truth, actual, plain = truth[finite], actual[finite].double(), plain[finite].double()
    error, own = (actual - truth).abs(), (plain - truth).abs()

    def rms(x: Tensor) -> float:
        return x.square().mean().sqrt().item()

    bounds = dict(
        rms_bound=2 * rms(own) + rounding * rms(truth),
        max_bound=2 * own.max().item() + rounding * truth.abs().max().item(),
    )
    found = dict(rms=rms(error), max=error.max().item(), plain_rms=rms(own), plain_max=own.max().item(), **bounds)
    fits = same_elsewhere and found["rms"] <= found["rms_bound"] and found["max"] <= found["max_bound"]
    return found | dict(fits=float(fits))


def assert_close_to_truth(actual: Tensor, plain: Tensor, truth: Tensor, what: str = "output") -> None:
    """Raises AssertionError with the worst element and the bounds where ``actual`` breaks the rule."""
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    if actual.numel() == 0:
        return
    found = measure(actual, plain, truth)
    if found["fits"]:
        return
    error = torch.nan_to_num((actual.double() - truth).abs(), nan=torch.inf)
    worst = int(error.argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), truth.shape)) if truth.dim() else ()
    numbers = ", ".join(f"{name} {value:.3g}" for name, value in found.items() if name != "fits")
    raise AssertionError(
        f"{what}: breaks the parity rule ({numbers}); worst at {at}: got {actual.flatten()[worst].item():.9g}, "
        f"truth {truth.flatten()[worst].item():.9g}, plain PyTorch {plain.flatten()[worst].item():.9g}"
    )


# The error of plain PyTorch on few numbers depends on chance. Outputs of fewer than FEW numbers are therefore judged
# together for DRAWS draws of the inputs, if a case has at most SMALL operations.
FEW = 32
DRAWS = 16
SMALL = 2_000_000


def more_seeds(op: Op, case: dict[str, Any], outputs: Sequence[Tensor]) -> range:
    """The seeds of further inputs that are judged together with those of seed 0, which gave these outputs."""
    few = any(0 < t.numel() < FEW for t in outputs if t.is_floating_point())
    return range(1, DRAWS) if few and work(op, case) <= SMALL else range(0)


def assert_parity(
    op: Op,
    case: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    what: str = "",
    device: str = "cpu",
) -> None:
    """Raises AssertionError where outputs of the backend in force break the rule. Integers must equal the reference's.

    The outputs are those for a case on ``device``.
    """
    args = build(op, case, dtype, layout)
    runs = [_run(op, args, device)]
    runs += [_run(op, build(op, case, dtype, layout, seed), device) for seed in more_seeds(op, case, runs[0][0])]
    for i, name in enumerate(names_of_outputs(op, args)):
        label = " ".join(filter(None, (op.name, what, name)))
        actual, plain, truth = (torch.stack([run[kind][i] for run in runs]) for kind in range(3))
        assert actual.dtype == plain.dtype, f"{label}: dtype {actual.dtype}, expected {plain.dtype}"
        if not actual.is_floating_point():
            assert torch.equal(actual, plain), f"{label}: got {actual}, expected {plain}"
        else:
            assert_close_to_truth(actual, plain, truth, label)


def _run(op: Op, args: dict[str, Any], device: str) -> tuple[tuple[Tensor, ...], ...]:
    """The outputs of the op, of plain PyTorch and the truth, all computed on ``device`` and copied to the CPU.

    Plain PyTorch runs there too, because products on a GPU may sum in another order than on a CPU.
    """
    if device != "cpu":
        args = {n: every(lambda t: _to(t, device), v) for n, v in args.items()}
    found = call(op, args), reference(op, args), truth(op, args)
    return tuple(tuple(t.cpu() for t in outputs) for outputs in found)


def _to(tensor: Tensor, device: str) -> Tensor:
    """A copy on ``device`` with the same strides."""
    out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return out.copy_(tensor)
