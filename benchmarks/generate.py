"""The whole model, 124M random parameters: ``python -m benchmarks.generate [--cases 1x32,8x512] [--json FILE]``.

The native model, the drop-in class and transformers (sdpa) alternate in one process. Each has read its weights from the
same checkpoint. For a batch of B prompts of P tokens and t(n), the seconds for n new tokens, in tokens per second:
prefill = P B / t(1) and decode = B (n - 1) / (t(n) - t(1)). Decoding must read the weights once for each token;
``bandwidth`` is that as a share of the read bandwidth measured in the same rounds. Last comes a training step of the
drop-in and of transformers (``train.py``), in tokens per second: B T over the seconds of a step.
"""

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import fresh, peak, train
from .options import DTYPES, parse_list
from .output import JSON_HELP, json_file, origin, write
from .table import markdown, show
from .timing import ratios, summarise

CASES = ["1x32", "1x512", "1x1023", "8x32", "8x512"]  # batch x prompt; 1023 leaves one position: no decode
QUICK = ["1x32", "1x512"]
NEW = {1: 33, 8: 17}
PEERS = ("native", "drop-in", "sdpa", "eager")
HEADER = ["case", "dtype", "what", "native", "drop-in", "sdpa", "±%", "native vs sdpa", "q10-q90", "drop-in vs sdpa",
          "q10-q90", "bandwidth"]  # fmt: skip


def make_checkpoint(folder: Path, dtype: str, **sizes) -> int:
    """Saves a GPT-2 with random weights. Returns the bytes of its parameters."""
    from gpt2fast import GPT2, Config

    torch.manual_seed(0)
    model = GPT2(Config(**sizes)).to(DTYPES[dtype])
    model.save_pretrained(folder)
    return sum(p.nbytes for p in model.parameters())


def load(folder: Path, dtype: str, names: list[str]) -> dict:
    """The contenders by name, as functions generate(tokens, n). Each has a model of its own."""
    import transformers

    import gpt2fast

    transformers.utils.logging.disable_progress_bar()

    def native(tokens, n):
        return model.generate(tokens, max_new_tokens=n, eos_token_id=[])

    def theirs(loaded, tokens, n):
        ones = torch.ones_like(tokens)
        return loaded.generate(tokens, attention_mask=ones, max_new_tokens=n, do_sample=False, pad_token_id=0)

    found = {}
    for name in names:
        if name == "native":
            model = gpt2fast.GPT2.from_pretrained(folder)
            found[name] = native
            continue
        kind = gpt2fast.GPT2LMHeadModel if name == "drop-in" else transformers.GPT2LMHeadModel
        attention = dict(attn_implementation="eager") if name == "eager" else dict(attn_implementation="sdpa")
        loaded = kind.from_pretrained(folder, dtype=DTYPES[dtype], **attention).eval()
        loaded.generation_config.eos_token_id = None  # so that every run makes all of its tokens
        found[name] = functools.partial(theirs, loaded)
    return found


def streamed_bytes(model_folder: Path, dtype: str) -> int:
    """The bytes of weights that decoding a token must read: all weights, but only one row of the table of positions."""
    from gpt2fast.model import GPT2, Config

    with torch.device("meta"):
        model = GPT2(Config.load(model_folder / "config.json"))
    elements = sum(p.numel() for p in model.parameters()) - model.wpe.weight.numel()
    return elements * DTYPES[dtype].itemsize


def clock(generate, tokens: torch.Tensor, n: int) -> float:
    start = time.perf_counter()
    out = generate(tokens, n)
    seconds = time.perf_counter() - start
    assert out.shape[1] == tokens.shape[1] + n, f"{out.shape[1] - tokens.shape[1]} tokens came, {n} were asked for"
    return seconds


def run_case(models: dict, case: str, dtype: str, weights: int, probe, seconds: float, least: int) -> list[dict]:
    """A row for prefill and, if there are positions left, a row for decode."""
    B, P = map(int, case.split("x"))
    tokens = torch.randint(0, 50257, (B, P), generator=torch.Generator().manual_seed(P))
    new = min(NEW.get(B, 17), 1024 - P)
    first: dict[str, list] = {name: [] for name in models}
    rest: dict[str, list] = {name: [] for name in models}
    read = []
    for generate in models.values():
        generate(tokens, min(2, new))
    start, rounds = time.perf_counter(), 0
    while rounds < least or (time.perf_counter() - start < seconds and rounds < 9):
        read.append(probe("read"))
        for name in models if rounds % 2 else reversed(models):
            first[name].append(clock(models[name], tokens, 1))
            if new > 1:
                rest[name].append(clock(models[name], tokens, new) - first[name][-1])
        rounds += 1

    def row(what: str, times: dict[str, list], work: float) -> dict:
        theirs = min((n for n in models if n in ("sdpa", "eager")), key=lambda n: summarise(times[n])["median"])
        return dict(
            case=case, dtype=dtype, what=what, rounds=rounds, best=theirs,
            seconds={n: summarise(t) for n, t in times.items()},
            rate={n: work / summarise(t)["median"] for n, t in times.items()},
            ratio={n: ratios(times[theirs], t) for n, t in times.items() if n not in ("sdpa", "eager")},
        )  # fmt: skip

    rows = [row("prefill", first, B * P)]
    if new > 1:
        rows.append(row("decode", rest, B * (new - 1)))
        shares = {n: [weights * (new - 1) / s / r for s, r in zip(t, read)] for n, t in rest.items()}
        rows[-1]["share"] = {n: summarise(s) for n, s in shares.items()}
        rows[-1]["read"] = summarise(read)
    return rows


def cells(row: dict) -> list[str]:
    B, P = row["case"].split("x")
    words = {"decode": f"after {P}", "prefill": f"prompt {P}"}.get(row["what"], f"{P} tokens")
    first = [f"batch {B}, {words}", row["dtype"], row["what"]]
    if "failed" in row:
        return [*first, *[""] * (len(HEADER) - len(first) - 2), "FAILED", "parity"]
    ours = row["seconds"].get("native") or row["seconds"]["drop-in"]
    spread = 50 * (ours["q90"] - ours["q10"]) / ours["median"]

    def ratio(name: str) -> list[str]:
        found = row["ratio"].get(name)
        return [f"{found['median']:.2f}x", f"{found['q10']:.2f}-{found['q90']:.2f}"] if found else ["", ""]

    rates = [f"{row['rate'][name]:.1f}" if name in row["rate"] else "" for name in ("native", "drop-in", row["best"])]
    share = row.get("share", {}).get("native")
    bandwidth = f"{100 * share['median']:.0f}%" if share else ""
    return [*first, *rates, f"{spread:.0f}", *ratio("native"), *ratio("drop-in"), bandwidth]


def run(
    dtypes: list[str], names: list[str], peers: list[str], seconds: float, with_fresh: bool, each=None,
    made_by: dict | None = None, training: Sequence[str] = (), **sizes,
) -> dict:  # fmt: skip
    """All rows, the machine's limits, and the figures of fresh processes. ``training``: cases of benchmarks.train.
    ``sizes``: of another model than 124M."""
    torch.use_deterministic_algorithms(False)
    probe = peak.Probe(huge=True, nbytes=peak.ARRAY)
    found = dict(kind="generate", made_by=made_by, machine=peak.machine(), peaks=peak.measure(quick=True), rows=[])
    for dtype in dtypes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            parameters = make_checkpoint(folder, dtype, **sizes)
            if with_fresh and dtype == "float32":
                found["fresh"] = fresh.measure(folder, parameters)
                each and each(found)
            models = load(folder, dtype, peers) if names else {}
            weights = streamed_bytes(folder, dtype)
            for case in names:
                least = 2 if case == "8x512" else 3
                found["rows"] += run_case(models, case, dtype, weights, probe, seconds, least)
                each and each(found)
            del models
            for case in training:
                found["rows"].append(train.run_case(folder, case, dtype, seconds))
                each and each(found)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--dtype", type=parse_list(DTYPES), default=list(DTYPES), metavar="A,B", help="float32,bfloat16"
    )
    parser.add_argument("--cases", metavar="BxP,...", help=f"default: {','.join(CASES)}")
    parser.add_argument(
        "--train", type=train.parse_cases, metavar="BxT,...", help="training steps: batch x tokens (default 2x256)"
    )
    parser.add_argument(
        "--eager", action="store_true", help="transformers' eager attention too; the best of both counts"
    )
    parser.add_argument(
        "--seconds", type=float, default=10, help="of rounds a case (default 10; at least 2 or 3 rounds)"
    )
    parser.add_argument("--threads", type=int, default=None, help="default: torch's")
    parser.add_argument("--quick", action="store_true", help="cases 1x32 and 1x512, training 2x64, 3 rounds")
    parser.add_argument("--no-fresh", action="store_true", help="leave out memory and time of fresh processes")
    parser.add_argument("--json", type=json_file, nargs="?", const="-", metavar="FILE", help=JSON_HELP)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    names = QUICK if args.quick else CASES
    if args.cases is not None:
        names = [name for name in args.cases.split(",") if name]
    if wrong := [name for name in names if name not in CASES]:
        parser.error(f"case must be one of {', '.join(CASES)}, got {wrong[0]}")
    training = (train.QUICK if args.quick else train.CASES) if args.train is None else args.train
    peers = [name for name in PEERS if name != "eager" or args.eager]

    printed = 0

    def each(found: dict) -> None:
        nonlocal printed
        if args.json != "-":
            write(found, args.json)
            for row in found["rows"][printed:]:
                print(*cells(row), sep="  ", file=sys.stderr, flush=True)
            printed = len(found["rows"])

    made_by = origin("python -m benchmarks.generate", argv)
    found = run(args.dtype, names, peers, 0 if args.quick else args.seconds, not args.no_fresh, each, made_by, training)
    failed = [row for row in found["rows"] if "failed" in row]
    if args.json == "-":
        write(found, "-")
        return int(bool(failed))
    title = f"tokens/s. {found['machine']['cpu']}, {found['machine']['isa']}, {found['machine']['threads']} threads"
    rows = [cells(row) for row in found["rows"]]
    if args.markdown:
        print(f"{title}\n\n{markdown(HEADER, rows, 3)}")
    else:
        show(HEADER, rows, title, 3)
    for line in fresh.describe(found.get("fresh", {})):
        print(line)
    for row in failed:
        print(f"{row['what']} {row['case']} {row['dtype']}: {row['failed']}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
