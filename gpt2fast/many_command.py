"""``gpt2fast generate --file``: continues the prompts of a file by ``generate_many`` and writes the texts."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .many import generate_many
from .model import GPT2
from .progress import progress
from .text import Tokenizer

DEFAULT_NEW_TOKENS = 100


def read_prompts(file: str) -> list[tuple[str, int | None]]:
    """The prompts of a file and their max_new_tokens, which may be None. ``-`` is standard input.

    A line is a prompt. In a file whose name ends in .jsonl, it is a JSON string, or an object with "prompt" and perhaps
    "max_new_tokens". Raises ValueError that names the line.
    """
    content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"generate: line {line} of {file} must be UTF-8, got other bytes") from None
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()  # a text file ends with a newline
    if not lines:
        raise ValueError(f"generate: {file} must have a prompt a line, got an empty file")
    parse = _parse_json if file.endswith(".jsonl") else lambda line: (line.removesuffix("\r"), None)
    found = []
    for number, line in enumerate(lines, 1):
        try:
            prompt, most = parse(line)
            if not prompt:
                raise ValueError("must have a prompt, got none")
        except ValueError as error:
            raise ValueError(f"generate: line {number} of {file} {error}") from None
        found.append((prompt, most))
    return found


def _parse_json(line: str) -> tuple[str, int | None]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"must be JSON: {error}") from None
    found = dict(prompt=found) if isinstance(found, str) else found
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise ValueError(f'must be a string or an object with "prompt", got {line[:80]}')
    if unknown := found.keys() - {"prompt", "max_new_tokens"}:
        raise ValueError(f'must have "prompt" and "max_new_tokens" only, got {sorted(unknown)[0]!r}')
    most = found.get("max_new_tokens")
    if most is not None and (type(most) is not int or most < 0):
        raise ValueError(f'must have an integer at least 0 as "max_new_tokens", got {most!r}')
    return found["prompt"], most


def run(args: argparse.Namespace, folder: Path) -> int:
    """What the command does, for a model in ``folder``. Bad lines are named before anything is written."""
    if args.prompt is not None:
        raise ValueError(f"generate: a prompt or --file must be given, got both, {args.prompt[:40]!r} and {args.file}")
    if args.prompt_lookup:
        raise ValueError("generate: --prompt-lookup must come with one prompt, got it with --file")
    prompts = read_prompts(args.file)
    tokenizer, model = Tokenizer.from_pretrained(folder), GPT2.from_pretrained(folder, weights=args.weights)
    ids = [tokenizer.encode(prompt) for prompt, _ in prompts]
    room = [model.config.n_positions - len(tokens) for tokens in ids]
    mosts = []
    for number, (space, (_, most)) in enumerate(zip(room, prompts, strict=True), 1):
        asked = args.max_new_tokens if most is None else most
        if space < (asked or 1):
            limit, count = model.config.n_positions, model.config.n_positions - space
            raise ValueError(
                f"generate: line {number} of {args.file}: prompt + new tokens must be at most n_positions = {limit}, "
                f"got {count} + {asked or 1}"
            )
        mosts.append(min(DEFAULT_NEW_TOKENS, space) if asked is None else asked)
    shown, started = _progress(len(ids)), time.perf_counter()
    results = generate_many(
        model, ids, batch_size=args.batch_size, max_new_tokens=mosts, min_new_tokens=args.min_new_tokens,
        do_sample=args.temperature != 0, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
        min_p=args.min_p, repetition_penalty=args.repetition_penalty, stop_strings=args.stop, tokenizer=tokenizer,
        seed=args.seed, progress=shown,
    )  # fmt: skip
    total = 0
    for index, new in enumerate(results):
        total += len(new)
        prompt = prompts[index][0]
        text = tokenizer.decode(ids[index] + new)
        if args.jsonl or args.json:
            row: dict[str, Any] = dict(index=index, prompt=prompt, text=text, tokens=new, new_tokens=len(new))
            print(json.dumps(row), flush=True)
        else:
            print(f"--- {index + 1}\n{text}", flush=True)
    seconds = time.perf_counter() - started
    print(f"{len(ids)} prompts · {total} tokens · {total / seconds:.1f} tokens/s", file=sys.stderr)
    return 0


def _progress(count: int) -> Callable[[int, int], None] | None:
    """Shows how far the prompts are, unless the texts come to the same terminal."""
    if sys.stdout.isatty():
        return None
    started = time.perf_counter()
    return progress(
        count,
        lambda ended, tokens: f"{ended} of {count} prompts, {tokens / (time.perf_counter() - started):.1f} tokens/s",
    )
