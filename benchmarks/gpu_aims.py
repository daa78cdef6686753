"""The project's aims on a GPU beside what ``make gpu`` measured: the table that closes its run.

A row is one piece of work with its aims: a share of what the device was measured to reach, and ratios to other ways. A
figure that was not measured is marked as such.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

ROWS = dict(B=16, T=1024)
WIDTHS = (768, 1600)
TRAINED = (16, 1024)
PARAMETERS, LAYERS, WIDTH = 124_439_808, 12, 768  # of the 124M model
STREAMED = ("layer_norm", "add_layer_norm", "gelu", "bias_gelu", "layer_norm_backward", "gelu_backward")
ATTENTION = dict(**ROWS, S=1024, H=12, D=64)
LOSS = dict(R=8192, V=50257)
# These cases are timed first, in bfloat16, before the cases that the benchmarks share.
CASES = {
    **{op: [dict(**ROWS, C=C) for C in WIDTHS] for op in STREAMED},
    **dict.fromkeys(("cross_entropy", "cross_entropy_backward"), [LOSS]),
    **dict.fromkeys(("attention", "attention_backward"), [ATTENTION]),
}


@dataclass(frozen=True)
class Aim:
    """An aim. ``share`` is of the copy bandwidth or of the dense peak. ``times``: how many times as fast as other ways,
    by their names."""

    work: str
    op: str
    case: dict
    share: float | None = None
    times: dict[str, float] = field(default_factory=dict)


def aims() -> Iterator[Aim]:
    for op in STREAMED:
        for C in WIDTHS:
            times = {"compiled": 1.0, "quack (no bias)": 1.0, "fused": 1.3}
            times |= {"liger": 2.0} if op == "layer_norm_backward" else {}
            yield Aim(f"{op}, 16384 x {C}", op, dict(**ROWS, C=C), 0.75 if "backward" in op else 0.85, times)
    for op in ("cross_entropy", "cross_entropy_backward"):
        yield Aim(f"{op}, 8192 x 50257", op, LOSS, 0.85, dict(compiled=1.0, fused=1.0))
    yield Aim("attention, causal, 16 x 1024", "attention", ATTENTION, None, dict(fused=1.0))
    yield Aim("attention_backward, causal, 16 x 1024", "attention_backward", ATTENTION, None, dict(sdpa=0.95))


def model_rows(stages: dict) -> Iterator[tuple[str, dict | None, float | None, float | None, dict[str, float]]]:
    """(work, row, share reached, share wanted, ratios wanted) for the whole model."""
    measured = stages.get("machine", {}).get("found") or {}
    rows = (stages.get("model", {}).get("found") or {}).get("rows", [])
    decode = next((r for r in rows if r["what"] == "decode after 32" and r["case"] == "1" and "seconds" in r), None)
    share = None
    if decode and "copy_bytes_per_second" in measured:
        share = decode["tokens_per_second"]["ours"] * 2 * PARAMETERS / measured["copy_bytes_per_second"]
    yield "decode, 124M, one row, bfloat16", decode, share, 0.4, dict(transformers=5.0)
    B, T = TRAINED
    steps = [r for r in rows if r["what"] == "training step" and r["case"] == f"{B}x{T}" and "seconds" in r]
    step = next((r for r in steps if "compiled_transformers" in r["seconds"]), None) or next(iter(steps), None)
    share = None
    if step and "bfloat16_flops_per_second" in measured:
        flops = 6 * B * T * (PARAMETERS + LAYERS * WIDTH * T)  # a token sees half of the others; backward counts twice
        share = flops / step["seconds"]["ours"]["median"] / measured["bfloat16_flops_per_second"]
    yield f"training step, 124M, {B} x {T}, bfloat16", step, share, 0.45, dict(compiled_transformers=1.1)


def table(stages: dict) -> list[str]:
    """A line for each aim: what was measured, and whether the aim is reached, as far as it was measured."""
    from .cases import describe

    rows = (stages.get("ops", {}).get("found") or {}).get("rows", [])
    timed = {(r["op"], r["case"]): r for r in rows if r["dtype"] == "bfloat16" and "seconds" in r}
    found = []
    for aim in aims():
        row = timed.get((aim.op, describe(aim.case)))
        found.append(line(aim.work, row, row["share"] if row else None, aim.share, aim.times))
    return found + [line(*each) for each in model_rows(stages)]


def line(work: str, row: dict | None, share: float | None, wanted: float | None, times: dict[str, float]) -> str:
    if row is None:
        return f"{work:44} not measured"
    words, reached = [], True
    if wanted is not None and share is not None:
        words.append(f"{share:.0%} of what the device reaches (aim {wanted:.0%})")
        reached = share >= wanted
    ours = row["seconds"]["ours"]["median"]
    for name, least in times.items():
        if name in row["seconds"]:
            ratio = row["seconds"][name]["median"] / ours
            words.append(f"{ratio:.2f} x {name} (aim {least:.2f})")
            reached = reached and ratio >= least
        else:
            words.append(f"{name} not measured")
    return f"{work:44} {'reached' if reached else 'MISSED '} {'; '.join(words)}"
