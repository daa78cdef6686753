"""Prompt lookup: drafts of the next tokens, taken from the text so far, that one pass of the model verifies.

Where the last tokens have occurred before, what followed them then is the draft. The model reads the last token and the
draft in one pass, and each position draws its token as it would have without a draft. The draft is accepted as far as
it equals what was drawn. So the tokens are those of plain decoding, drawn ones too, where a row's bits do not depend
on the number of tokens, as with our kernels on a CPU. A. Saxena, "Prompt lookup
decoding", 2023; the verification is that of Leviathan et al., "Fast inference from transformers via speculative
decoding", 2023, for a draft that is certain.
"""

from dataclasses import dataclass, field

import torch

from .cache import MOST_DECODED

MOST_DRAFTED = MOST_DECODED - 1  # the pass reads the last token, too


@dataclass
class PromptLookup:
    """An option of ``generate``, and what it counted there.

    Attributes:
        num_tokens: the most tokens of a draft, 1 to 7.
        most_matched, least_matched: a draft follows the longest match of the last tokens, of so many tokens.
        passes: the calls of the model after the prompt; drafted, accepted: tokens of the drafts.
    """

    num_tokens: int = MOST_DRAFTED
    most_matched: int = 4
    least_matched: int = 2
    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    _tokens: list[int] = field(default_factory=list, repr=False)
    _ends: dict[tuple[int, ...], int] = field(default_factory=dict, repr=False)  # where a match was followed last

    def __post_init__(self):
        limits = dict(num_tokens=(1, MOST_DRAFTED), least_matched=(1, None), most_matched=(self.least_matched, None))
        for name, (least, most) in limits.items():
            found = getattr(self, name)
            if type(found) is not int or found < least or (most is not None and found > most):
                expected = f"at least {least}" if most is None else f"from {least} to {most}"
                raise ValueError(f"gpt2fast.PromptLookup: {name} must be an integer {expected}, got {found!r}")

    def begin(self, tokens: list[int]) -> None:
        """Forgets all that was counted, and reads a prompt."""
        self.passes = self.drafted = self.accepted = 0
        self._tokens, self._ends = [], {}
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """Reads the token that comes next in the text."""
        end = len(self._tokens)
        for count in range(self.least_matched, min(self.most_matched, end) + 1):
            self._ends[tuple(self._tokens[end - count :])] = end
        self._tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """What followed the last tokens when they occurred before: at most ``most`` tokens, or none."""
        most, length = min(most, self.num_tokens), len(self._tokens)
        for count in range(min(self.most_matched, length), self.least_matched - 1, -1):
            at = self._ends.get(tuple(self._tokens[length - count :]))
            if at is not None and most > 0:
                return self._repeated(at, most)
        return []

    def _repeated(self, at: int, most: int) -> list[int]:
        """``most`` tokens from ``at`` on. Where the text ends, it goes on as if the part since ``at`` repeated."""
        period = len(self._tokens) - at
        return [self._tokens[at + i % period] for i in range(most)]

    def count(self, drafted: int, accepted: int) -> None:
        self.passes, self.drafted, self.accepted = self.passes + 1, self.drafted + drafted, self.accepted + accepted


def accepted(draft: torch.Tensor, drawn: torch.Tensor) -> int:
    """How many tokens of the draft (k,) are the ones that were drawn (k + 1,), up to the first that is not."""
    same = draft == drawn[: len(draft)]
    return int(same.long().cumprod(0).sum())
