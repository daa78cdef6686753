"""The command line: ``gpt2fast generate | pack | eval | info | check | bench | tune | new-op``.

Each command imports what it needs when it runs.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

from . import __version__

DEMO_MODEL = Path(__file__).parent / "demo_model"
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "triton", "numpy")
STARTED = time.perf_counter()


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpt2fast", description="GPT-2, fast.")
    parser.add_argument("--version", action="version", version=f"gpt2fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    common.add_argument("--backend", metavar="NAME", help="run every op on this backend (see info)")
    common.add_argument("--isa", metavar="NAME", help="run the CPU kernels of this instruction set (see info)")

    add = commands.add_parser("generate", parents=[common], help="continue a text, streaming it as it comes")
    add.add_argument("prompt", nargs="?", help="the text to continue; standard input without it")
    add.add_argument("-m", "--model", default=None, help="folder or hub name (default: the shipped model)")
    add.add_argument("-n", "--max-new-tokens", type=int, default=None, metavar="N", help="default: 100, or what fits")
    add.add_argument("--min-new-tokens", type=int, default=0, metavar="N")
    add.add_argument("-t", "--temperature", type=float, default=0.8, help="0: always the likeliest token (default 0.8)")
    add.add_argument("--top-k", type=int, default=50, metavar="K", help="0: off (default 50)")
    add.add_argument("--top-p", type=float, default=1.0, metavar="P")
    add.add_argument("--min-p", type=float, default=0.0, metavar="P")
    add.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X")
    add.add_argument("--seed", type=int, default=None, help="of the draws (default: a new one each time)")
    add.add_argument("--stop", action="append", metavar="TEXT", help="stop after this text; may be repeated")
    text = "verify drafts of up to N tokens, taken from the text before, in one pass (1 to 7; default: 0, off)"
    add.add_argument("--prompt-lookup", type=int, default=0, metavar="N", help=text)
    add.add_argument("--file", metavar="FILE", help="continue each line of a text or .jsonl file; -: standard input")
    add.add_argument("--jsonl", action="store_true", help="with --file: write a JSON object for each prompt")
    add.add_argument("--batch-size", type=int, default=8, metavar="N", help="with --file: rows at a time (default 8)")
    text = "float32, bfloat16, float16, int8 or int4 (default: as saved)"
    add.add_argument("--weights", default=None, metavar="FORMAT", help=text)
    add.set_defaults(run=run_generate)

    text = "save a model with weights of 8 or 4 bits, for inference on a CPU"
    add = commands.add_parser("pack", parents=[common], help=text)
    add.add_argument("out", metavar="OUT", help="the folder to write")
    add.add_argument("-m", "--model", default=None, help="folder or hub name (default: the shipped model)")
    add.add_argument("--weights", default="int8", metavar="FORMAT", help="int8 or int4 (default: int8)")
    add.set_defaults(run=run_pack)

    text = "perplexity of a text, and what each format of weights loses"
    add = commands.add_parser("eval", parents=[common], help=text)
    add.add_argument("--text", type=Path, action="append", required=True, metavar="FILE", help="may be repeated")
    add.add_argument("-m", "--model", default=None, help="folder or hub name (default: the shipped model)")
    add.add_argument("--weights", default=None, metavar="A,B", help="formats of weights (default: all)")
    add.add_argument("--window", type=int, default=None, metavar="N", help="tokens at a time (default: n_positions)")
    add.add_argument("--stride", type=int, default=None, metavar="N", help="between windows (default: half a window)")
    add.add_argument("--tokens", type=int, default=None, metavar="N", help="read at most so many")
    add.set_defaults(run=run_eval)

    add = commands.add_parser("info", parents=[common], help="machine, instruction sets, backends, versions")
    add.set_defaults(run=run_info)
    how = "import this module, which declares ops, first; may be repeated"
    add = commands.add_parser("check", parents=[common], help="check ops against their references")
    add.add_argument("ops", nargs="*", metavar="OP", help="ops by name (default: all)")
    add.add_argument("--import", dest="modules", action="append", default=[], metavar="MODULE", help=how)
    add.set_defaults(run=run_check)
    # benchmarks/options.py defines the options of bench, --help included.
    add = commands.add_parser("bench", add_help=False, allow_abbrev=False, help="time ops against PyTorch")
    add.set_defaults(run=run_bench, isa=None, backend=None)
    text = "find the fastest tile sizes of the Triton kernels on this GPU"
    add = commands.add_parser("tune", parents=[common], help=text)
    add.add_argument("kernels", nargs="*", metavar="KERNEL", help="kernels by name (default: all that have a table)")
    add.add_argument("--out", default="tiles.json", metavar="FILE", help="the table to write or to add to")
    add.add_argument("--seconds", type=float, default=600, metavar="N", help="start nothing new after so long")
    add.set_defaults(run=run_tune)
    text = "write a package with an op of your own, its kernels and tests, to start from"
    add = commands.add_parser("new-op", help=text)
    add.add_argument("name", metavar="NAME", help="of the package and its op: small letters, digits and _")
    add.add_argument("--backends", default="cpu,triton,cuda", metavar="A,B", help="kernels to write (default: all)")
    add.add_argument("--out", default=".", metavar="FOLDER", help="where the package's folder comes (default: here)")
    add.set_defaults(run=run_new_op, isa=None, backend=None)
    return parser


def run_generate(args: argparse.Namespace) -> int:
    if args.file is not None:
        from . import many_command

        return many_command.run(args, _locate_model(args.model))
    prompt = args.prompt
    if prompt is None:
        if sys.stdin.isatty():
            raise ValueError("generate: a prompt must be given, as an argument or on standard input")
        prompt = _read_stdin().removesuffix("\n")  # a shell adds a newline at the end
    if not prompt:
        raise ValueError("generate: the prompt must not be empty")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # Python decodes bytes that are not UTF-8 to surrogates
        raise ValueError(f"generate: the prompt must be UTF-8, got other bytes at character {error.start}") from None
    import torch

    from .backends import isa
    from .dtypes import dtype_name
    from .lookup import PromptLookup
    from .model import GPT2
    from .packed import weights_of
    from .streaming import TextStreamer
    from .text import Tokenizer

    folder = _locate_model(args.model)
    tokenizer = Tokenizer.from_pretrained(folder)
    model = GPT2.from_pretrained(folder, weights=args.weights)
    input_ids = torch.tensor([tokenizer.encode(prompt)], dtype=torch.int64)
    room = max(model.config.n_positions - input_ids.shape[1], 1)
    lookup = PromptLookup(args.prompt_lookup) if args.prompt_lookup else None
    pieces: list[str] = []
    streamer = Timed(TextStreamer(tokenizer, pieces.append if args.json else None))
    loaded = time.perf_counter()
    out = model.generate(
        input_ids,
        max_new_tokens=min(100, room) if args.max_new_tokens is None else args.max_new_tokens,
        min_new_tokens=args.min_new_tokens,
        do_sample=args.temperature != 0,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        stop_strings=args.stop,
        tokenizer=tokenizer,
        streamer=streamer,
        seed=args.seed,
        prompt_lookup=lookup,
    )
    new = out.shape[1] - input_ids.shape[1]
    times = streamer.times
    first, last = (times[0], times[-1]) if times else (loaded, loaded)
    found = dict(
        model=args.model or "demo_model",
        weights=weights_of(model) or dtype_name(model.wte.weight.dtype),
        prompt_tokens=input_ids.shape[1],
        new_tokens=new,
        tokens_per_second=(new - 1) / (last - first) if new > 1 else None,
        time_to_first_token_s=first - loaded if times else None,
        start_to_first_token_s=first - STARTED if times else None,
        isa=isa(),
        threads=torch.get_num_threads(),
    )
    if lookup is not None:
        found["prompt_lookup"] = dict(passes=lookup.passes, drafted=lookup.drafted, accepted=lookup.accepted)
    if args.json:
        print(json.dumps(dict(text="".join(pieces), tokens=out[0].tolist()) | found))
        return 0
    rate = f"{found['tokens_per_second']:.1f} tokens/s" if new > 1 else f"{new} tokens"
    wait = f"first token after {1e3 * (first - loaded):.0f} ms" if times else "no new token"
    kernels = found["isa"] or "no C++ kernels"
    parts = [rate, wait, f"{new} tokens", found["weights"], kernels]
    if lookup is not None:
        parts.append(f"{lookup.accepted} of {lookup.drafted} drafted tokens accepted")
    print(f"\n\n{' · '.join(parts)}", file=sys.stderr)
    return 0


def _locate_model(name: str | None) -> Path:
    """The folder of a model; by default the shipped one."""
    from .weights import locate

    if name is None and not (DEMO_MODEL / "config.json").is_file():
        raise FileNotFoundError("this installation has no shipped model; name one with --model")
    return locate(name or DEMO_MODEL)


def run_pack(args: argparse.Namespace) -> int:
    from .packed_file import pack_folder

    found = pack_folder(_locate_model(args.model), Path(args.out), args.weights)
    if args.json:
        print(json.dumps(found))
    else:
        rate = found["bytes"] / found["float32_bytes"]
        print(f"{found['file']}: {found['bytes'] / 1e6:.1f} MB, {rate:.1%} of float32")
    return 0


def run_eval(args: argparse.Namespace) -> int:
    from .evaluate import FORMATS, compare_formats, table

    formats = FORMATS if args.weights is None else [name.strip() for name in args.weights.split(",")]
    folder = _locate_model(args.model)
    rows = compare_formats(folder, args.text, formats, args.window, args.stride, args.tokens)
    if args.json:  # JSON has no NaN and no infinity
        rows = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()} for r in rows]
    print(json.dumps(rows) if args.json else table(rows))
    return 0


class Timed:
    """Wraps a streamer and stores the time of each new token."""

    def __init__(self, streamer):
        self.streamer, self.times, self._prompt_follows = streamer, [], True

    def put(self, tokens) -> None:
        self.streamer.put(tokens)
        if not self._prompt_follows:
            self.times.append(time.perf_counter())
        self._prompt_follows = False

    def end(self) -> None:
        self.streamer.end()


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"generate: the prompt must be UTF-8, got other bytes at byte {error.start}") from None


def gather_info() -> dict:
    """The content of ``info``, by section."""
    import importlib.metadata
    import platform

    import torch

    from . import backends, extension
    from .testing.packages import import_entry_points

    left_out = import_entry_points()
    versions = {"gpt2fast": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    versions["torch when built"] = extension.built_with()
    compiled = list(backends._C.compiled_isas()) if backends._C else []
    runnable = list(backends._C.runnable_isas()) if backends._C else []
    return dict(
        machine=dict(
            system=f"{platform.system()} {platform.machine()}",
            cpu=_cpu_name() or platform.processor() or platform.machine(),
            cores=os.cpu_count(),
            threads=torch.get_num_threads(),
            gpu=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        ),
        isa=dict(
            in_use=backends.isa(),
            compiled={name: None if name in runnable else "this CPU does not have it" for name in compiled},
        ),
        backends=dict(in_use=backends.active(), found=backends.status()),
        ops=_choices(),
        packages_left_out=left_out,
        versions=versions,
    )


def _choices() -> dict[str, dict[str, str]]:
    """What runs a float32 call of each op on each device."""
    import torch

    from . import backends, ops  # noqa: F401  declares the ops
    from .op import OPS

    found: dict[str, dict[str, str]] = {}
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for name, declared in OPS.items():
            try:
                tokens = 1 if declared.derivative_of is None else 64  # as in decoding, and in a backward pass
                choice = backends.choose(declared, **declared.example(device=device, T=tokens))
                found.setdefault(device, {})[name] = backends.describe(choice)
            except RuntimeError:  # the backend in force does not cover it
                found.setdefault(device, {})[name] = "an error"
    return found


def _cpu_name() -> str | None:
    """Name, family and model of the CPU. Virtual machines often give several generations the same name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    found: dict[str, str] = {}
    for line in lines:
        field, _, value = line.partition(":")
        found.setdefault(field.strip(), value.strip())
    name = found.get("model name")
    if name and "cpu family" in found and "model" in found:
        return f"{name}, family {found['cpu family']} model {found['model']}"
    return name


def run_info(args: argparse.Namespace) -> int:
    found = gather_info()
    if args.json:
        print(json.dumps(found))
        return 0
    gpus = ", ".join(found["machine"]["gpu"]) or "none"
    rows = [(name, str(value)) for name, value in (found["machine"] | dict(gpu=gpus)).items()]
    rows.append(("isa", found["isa"]["in_use"] or "none: the extension is not there"))
    rows += [(f"  {name}", reason or "can run") for name, reason in found["isa"]["compiled"].items()]
    rows.append(("backend", found["backends"]["in_use"]))
    rows += [(f"  {name}", reason or "can run") for name, reason in found["backends"]["found"].items()]
    for device, choices in found["ops"].items():
        for kind in dict.fromkeys(choices.values()):
            rows.append((f"{device} ops on", f"{kind}: {', '.join(n for n, k in choices.items() if k == kind)}"))
    rows += [("ops left out", f"{package}: {error}") for package, error in found["packages_left_out"].items()]
    rows += [(name, version or "not installed") for name, version in found["versions"].items()]
    _print_table(rows)
    return 0


def _print_table(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    try:
        from rich.console import Console
        from rich.markup import escape
    except ImportError:
        for name, value in rows:
            print(f"{name:{width}}  {value}")
        return
    console = Console(highlight=False, soft_wrap=True)
    for name, value in rows:
        console.print(f"[bold]{escape(f'{name:{width}}')}[/bold]  {escape(value)}")


def run_check(args: argparse.Namespace) -> int:
    from .testing import run_check
    from .testing.packages import import_modules

    import_modules(args.modules)
    return run_check(args.ops, args.json)


def run_bench(args: argparse.Namespace) -> int:
    from .testing import run_bench

    return run_bench(args.rest)


def run_tune(args: argparse.Namespace) -> int:
    from .benchmarks.tune import main

    return main(args.kernels, Path(args.out), args.seconds, args.json)


def run_new_op(args: argparse.Namespace) -> int:
    from .new_op import write

    backends = [name for name in args.backends.split(",") if name]
    for path in write(args.name, backends, Path(args.out)):
        print(Path(args.out) / args.name / path)
    print(f"Now, in {Path(args.out) / args.name}:\n\n  pip install --no-build-isolation -e .\n  pytest tests")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args, args.rest = parser.parse_known_args(argv)
    if args.rest and args.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(args.rest)}")
    if args.isa:
        os.environ["GPT2FAST_CPU_ISA"] = args.isa
    try:
        if args.backend:
            from . import ops  # noqa: F401  a backend registers kernels of declared ops
            from .backends import use_backend

            use_backend(args.backend)
        return args.run(args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python reports an error at exit
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        text = str(error)
        print(text if text.startswith("gpt2fast") else f"gpt2fast: {text}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
