"""Whether an engine generates what transformers generates, judged before the engine is timed.

transformers reads the prompt and the engine's own tokens in one pass, in float32 and in float64. Each token of the
engine is compared with the most likely one after the same tokens before it, so that one other choice does not count
again in all tokens after it. A float32 engine must choose as float32 does, or there must be a near-tie: in float64 the
two tokens are no further apart than two errors that the parity rule allows. Engines that compute in fewer bits may
choose otherwise, but the tokens of each row must on average have logits nearer to the highest one than to the mean.
"""

from pathlib import Path

import torch

from gpt2fast.testing.parity import measure

from .peer_engines import Rows, load_transformers, read_config


class Judge:
    """transformers' model of a checkpoint in float32 and in float64."""

    def __init__(self, checkpoint: Path):
        self.config = read_config(checkpoint)
        self.plain, self.exact = (load_transformers(checkpoint, dtype) for dtype in ("float32", "float64"))

    def __call__(self, tokens: Rows, found: Rows, new: int) -> dict:
        """How the engine's tokens ``found`` agree: how many of ``tokens`` are the ``same``, near-ties, and the first of
        the others. ``height``: where the logits of a row's tokens are on average, from 0, the mean logit, to 1, the
        highest one; that of the lowest row.
        ``malformed`` says what is wrong with rows that cannot be judged."""
        if malformed := self._malformed(tokens, found, new):
            return dict(tokens=len(tokens) * new, same=0, near_ties=[], first_difference=None, malformed=malformed)
        result: dict = dict(tokens=len(tokens) * new, same=0, near_ties=[], first_difference=None)
        heights = []
        for r, (prompt, row) in enumerate(zip(tokens, found)):
            ids = torch.tensor([prompt + row[:-1]])
            with torch.inference_mode():
                plain, exact = (m(ids, logits_to_keep=new).logits[0] for m in (self.plain, self.exact))
            mean, chosen = exact.mean(-1), exact.gather(-1, torch.tensor(row)[:, None])[:, 0]
            heights.append(((chosen - mean) / (exact.amax(-1) - mean)).mean().item())
            for i, (ours, theirs) in enumerate(zip(plain.argmax(-1).tolist(), row)):
                if ours == theirs:
                    result["same"] += 1
                    continue
                gap = abs((exact[i, ours] - exact[i, theirs]).item())
                allowed = 2 * measure(plain[i], plain[i], exact[i])["max_bound"]
                other = dict(row=r, token=i, expected=ours, got=theirs, gap=gap, near_tie_below=allowed)
                if gap <= allowed:
                    result["near_ties"].append(other)
                elif result["first_difference"] is None:
                    result["first_difference"] = other
        return result | dict(height=min(heights))

    def _malformed(self, tokens: Rows, found: Rows, new: int) -> str:
        if [len(row) for row in found] != [new] * len(tokens):
            return f"expected {len(tokens)} rows of {new} tokens, got rows of {[len(row) for row in found]}"
        limit = self.config["vocab_size"]
        wrong = [token for row in found for token in row if not 0 <= token < limit]
        return f"expected tokens below {limit}, got {wrong[0]}" if wrong else ""


def share(found: dict) -> float:
    """The share of an engine's tokens that are transformers' choice or a near-tie of it."""
    return (found["same"] + len(found["near_ties"])) / found["tokens"]


def refusal(found: dict, exact: bool) -> str:
    """Why an engine with these tokens is not timed, or nothing. ``exact``: whether it computes in float32."""
    if "malformed" in found:
        return found["malformed"]
    first = found["first_difference"]
    if first is None or (not exact and found["height"] > 0.5):  # nearer to 1 than to 0
        return ""
    return (
        f"differs from transformers: row {first['row']}, new token {first['token']} is {first['got']}, expected "
        f"{first['expected']}; their logits are {first['gap']:.3g} apart, a near-tie is at most "
        f"{first['near_tie_below']:.3g}; {100 * share(found):.0f}% of all tokens agree"
    )
