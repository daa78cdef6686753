"""A training step of the whole model on the CPU: forward pass, backward pass and AdamW.

The drop-in, made by ``gpt2fast.optimize``, and transformers (sdpa) alternate in one process. Both start from the same
checkpoint, train without dropout, and have the same optimizer: torch.optim.AdamW(fused=True). Before anything is timed,
the losses and the gradients of the drop-in must keep the parity rule.
"""

import argparse
import functools
import re
from pathlib import Path

import torch
from torch import Tensor

from gpt2fast.testing.parity import DRAWS, assert_close_to_truth

from .options import DTYPES
from .timing import alternate, ratios, summarise

CASES, QUICK = ["2x256"], ["2x64"]  # batch x tokens
NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
SHORT = 32  # tokens of each draw on which the losses are compared
ROUNDS = (3, 9)  # least and most
LEARNING_RATE = 1e-5


def parse_cases(text: str) -> list[str]:
    """For argparse: ``2x256,1x64``, batch x tokens. An empty text gives no case."""
    found = [part for part in text.split(",") if part]
    for part in found:
        size = re.fullmatch(r"([1-9]\d*)x(\d+)", part, re.ASCII)
        if not size or not 2 <= int(size[2]) <= 1024:
            raise argparse.ArgumentTypeError(f"must be like 2x256, batch x 2 to 1024 tokens; got {part!r}")
    return found


def load(folder: Path, dtype: torch.dtype):
    """transformers' model of the checkpoint, in training mode."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    kind = transformers.GPT2LMHeadModel
    return kind.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa", **NO_DROPOUT).train()


def make_tokens(model, B: int, T: int, seed: int) -> Tensor:
    """Random tokens (B, T)."""
    return torch.randint(0, model.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def assert_right(ours, plain, exact, B: int, T: int) -> None:
    """Raises AssertionError if the losses or the gradients of ``ours`` break the parity rule.

    ``plain`` is transformers' model in the same dtype, and ``exact`` the same one in float64. A loss is a single
    number, so the losses of DRAWS short batches are judged together. The gradients are those of a batch (B, T), tensor
    by tensor; all three models lose theirs.
    """
    models = (ours, plain, exact)
    batches = [make_tokens(plain, 1, min(T, SHORT), seed) for seed in range(DRAWS)]
    with torch.no_grad():
        losses = [torch.stack([model(ids, labels=ids).loss for ids in batches]) for model in models]
    assert_close_to_truth(*losses, "loss")
    ids = make_tokens(plain, B, T, DRAWS)
    for model in models:
        model(ids, labels=ids).loss.backward()
    for (name, p), q, r in zip(ours.named_parameters(), plain.parameters(), exact.parameters(), strict=True):
        assert_close_to_truth(p.grad, q.grad, r.grad, f"gradient of {name}")
    for model in models:
        model.zero_grad()


def step(model, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def run_case(folder: Path, case: str, dtype: str, seconds: float, rounds: tuple[int, int] = ROUNDS) -> dict:
    """The row of one case, like the rows of benchmarks.generate. Where the drop-in breaks the parity rule, nothing is
    timed, and the row says why in ``failed``."""
    import gpt2fast

    B, T = map(int, case.split("x"))
    row = dict(case=case, dtype=dtype, what="training step")
    models = {"drop-in": gpt2fast.optimize(load(folder, DTYPES[dtype])), "sdpa": load(folder, DTYPES[dtype])}
    try:
        assert_right(*models.values(), load(folder, torch.float64), B, T)
    except AssertionError as failure:
        return row | dict(failed=str(failure))
    calls = {}
    for name, model in models.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
        calls[name] = [functools.partial(step, model, optimizer, make_tokens(model, B, T, 0))]
    times = alternate(calls, seconds=seconds, rounds=rounds)
    found = {name: summarise(t) for name, t in times.items()}
    return row | dict(
        rounds=len(times["sdpa"]), best="sdpa", seconds=found,
        rate={name: B * T / each["median"] for name, each in found.items()},
        ratio={"drop-in": ratios(times["sdpa"], times["drop-in"])},
    )  # fmt: skip
