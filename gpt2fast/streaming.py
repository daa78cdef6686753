"""A streamer for ``generate``, which calls put(tokens) with the prompt, put(tokens) after each step, and then end()."""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor


class TextStreamer:
    """Writes the text of one row while it is generated, in whole characters.

    ``write`` gets each piece of text. By default, it writes to standard output at once. ``skip_prompt`` leaves the
    prompt out.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], Any] | None = None, skip_prompt: bool = False):
        self.stream = tokenizer.stream()
        self.write = write or _to_stdout
        self.skip_prompt = skip_prompt
        self._prompt_follows = True

    def put(self, tokens: Tensor) -> None:
        if tokens.shape[0] != 1:
            raise ValueError(f"gpt2fast.TextStreamer: one row can be streamed, got {tokens.shape[0]}")
        is_prompt, self._prompt_follows = self._prompt_follows, False
        if is_prompt and self.skip_prompt:
            return
        text = "".join(self.stream.put(token) for token in tokens.flatten().tolist())
        if text:
            self.write(text)

    def end(self) -> None:
        if text := self.stream.end():
            self.write(text)
        self._prompt_follows = True


def _to_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
