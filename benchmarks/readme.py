"""The README's numbers from ``benchmarks/published``: ``python -m benchmarks.readme``.

It writes what stands between the lines ``<!-- numbers -->`` of README.md, and the picture beside the published files.
``--publish FILE.json ...`` puts results of benchmarks.ops, generate and peers there first, without single rounds.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import picture, readme_peers, report
from .cases import describe
from .readme_cells import PREPOSITIONS, ratio, work, wrap
from .table import markdown
from .units import number

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT / "benchmarks" / "published"
PEERS = "cpu_peers.json"  # of PUBLISHED; without it the README has no table of other engines
MARK = "<!-- numbers -->"
DTYPES = ("float32", "bfloat16")
MODELS = {"native": "`GPT2`", "drop-in": "drop-in"}
# What the model calls on its way, in words: in generating one token, in reading a prompt, in training.
ON_THE_WAY = [
    ("embedding", dict(B=4, T=512, C=768, V=50257, P=1024), "4 × 512 tokens"),
    ("layer_norm", dict(B=1, T=1, C=768), "1 × 768"),
    ("layer_norm", dict(B=4, T=1024, C=768), "4096 × 768"),
    ("linear", dict(B=1, T=1, K=768, N=2304, bias=True), "768 → 2304, 1 row"),
    ("linear", dict(B=1, T=512, K=768, N=2304, bias=True), "768 → 2304, 512 rows"),
    ("linear", dict(B=1, T=512, K=768, N=3072, bias=True, activation="gelu_tanh"), "768 → 3072 with GELU, 512 rows"),
    ("linear", dict(B=1, T=512, K=3072, N=768, bias=True, residual=True), "3072 → 768 with residual, 512 rows"),
    ("linear", dict(B=1, T=1, K=768, N=50257, transposed=True), "768 → 50257, 1 row (the head)"),
    ("linear", dict(B=8, T=1, K=768, N=50257, transposed=True), "768 → 50257, 8 rows"),
    ("attention", dict(B=4, T=1024, S=1024, H=12, D=64), "causal, 4 × 1024 tokens, 12 heads"),
    ("decode_attention", dict(B=1, T=1, S=1024, H=12, D=64), "1 row, 1024 keys"),
    ("decode_attention", dict(B=8, T=1, S=512, H=12, D=64, starts=True), "8 rows, up to 512 keys"),
]
# Whose large outputs PyTorch's allocator maps anew for every call, and which the model calls elsewhere or not at all.
LARGE_OUTPUTS = [
    ("cross_entropy", dict(R=1024, V=50257), "1024 × 50257 (training)"),
    ("gelu", dict(B=4, T=1024, C=3072, approximate="tanh"), "tanh, 4096 × 3072"),
    ("bias_gelu", dict(B=4, T=1024, C=3072, approximate="tanh"), "tanh, 4096 × 3072"),
    ("add_layer_norm", dict(B=4, T=1024, C=768), "4096 × 768"),
]


def ops_table(rows: list[dict], wanted: Sequence[tuple[str, dict, str]]) -> dict[str, list[str]]:
    """By the words of a row its cells, a dtype each; ValueError for a case that the results lack."""
    found = {(row["op"], row["label"], row["dtype"]): row for row in rows}
    table = {}
    for op, case, words in wanted:
        keys = [(op, describe(case), dtype) for dtype in DTYPES]
        if missing := [key for key in keys if key not in found or "ratios" not in found[key]]:
            raise ValueError(f"benchmarks.readme: the published results lack {', '.join(missing[0])}")
        table[f"`{op}`, {words}"] = [ratio(found[key]["ratios"].get("fused")) for key in keys]
    return table


def model_table(rows: list[dict]) -> str:
    found = {(row["what"], row["case"], row["dtype"]): row.get("ratio", {}) for row in rows}
    header = ["GPT-2 124M against transformers (sdpa)", *(f"{d} {m}" for d in DTYPES for m in MODELS.values())]
    lines = []
    for what in PREPOSITIONS:
        for case in dict.fromkeys(case for w, case, _ in found if w == what):
            cells = (ratio(found.get((what, case, d), {}).get(m)) for d in DTYPES for m in MODELS)
            lines.append([work(what, case), *cells])
    return markdown(header, lines)


def section(model: dict, ops: dict, kept: dict, peers: dict | None = None) -> str:
    """The text between the marks, from results of benchmarks.generate and two of benchmarks.ops: with the system's
    allocator, and with freed memory kept. ``peers``: a result of benchmarks.peers; without it there is no such table.
    """
    rates = {(row["what"], row["case"], row["dtype"]): row for row in model["rows"]}
    machine, versions = model["machine"], model["made_by"]["versions"]

    def per_second(what: str, case: str) -> str:
        return " and ".join(f"{number(rates[what, case, d]['rate']['native'])} in {d}" for d in DTYPES)

    shares = [row["share"]["native"]["median"] for row in model["rows"]
              if row["what"] == "decode" and row["dtype"] == "float32" and row["case"].startswith("1x")]  # fmt: skip
    read = [row["read"]["median"] / 1e9 for row in model["rows"] if "read" in row]
    plain, alone = (ops_table(results["rows"], LARGE_OUTPUTS) for results in (ops, kept))
    header = ["", "float32, as programs run", "kernels alone", "bfloat16, as programs run", "kernels alone"]
    large = [[words, *(cell for pair in zip(plain[words], alone[words]) for cell in pair)] for words in plain]
    fresh = model["fresh"]
    parts = [
        "![Bars: how many times as fast as transformers](benchmarks/published/cpu.svg)",
        f"Measured on {model['made_by']['date']} on {machine['threads']} threads of {machine['cpu']} "
        f"({machine['isa']}), a shared virtual machine whose read bandwidth was {number(min(read), 2)} to "
        f"{number(max(read), 2)} GB/s in that run, with torch {versions['torch']} and transformers "
        f"{versions['transformers']}. Both sides alternate in one process: the ratio is the median of the pairs, with "
        f"the 10 % and 90 % quantiles. Ratios carry over to other machines better than times; `make bench` measures "
        f"yours. The tables and the picture are made of `benchmarks/published/cpu_*.json`; each of these files holds "
        f"the command that wrote it.",
        model_table(model["rows"]),
        f"Native tokens/s in that run: decode after 512 at batch 1, {per_second('decode', '1x512')}; prefill of 512, "
        f"{per_second('prefill', '1x512')}. Decoding in float32 at batch 1 read its weights at "
        f"{100 * min(shares):.0f} to {100 * max(shares):.0f} % of the read bandwidth measured beside it. A native "
        f"float32 model needs {fresh['memory']:.2f} × its weights of memory to load and decode; from the start of the "
        f"process to its first token it takes {fresh['start']:.2f} × a bare `import torch`.",
        *(readme_peers.parts(peers) if peers else []),
        markdown(["What the model calls, against PyTorch's fused op", *DTYPES],
                 [[words, *cells] for words, cells in ops_table(ops["rows"], ON_THE_WAY).items()]),
        "PyTorch's allocator maps large outputs anew for every call, ours come from kept blocks. Where that counts, "
        "the kernels alone are compared too, with freed memory kept on both sides:",
        markdown(header, large),
    ]  # fmt: skip
    return "\n\n".join(wrap(part) for part in parts if part)


def published(name: str) -> dict:
    return report.read_file(PUBLISHED / f"cpu_{name}.json")


def made() -> tuple[str, str]:
    """The section and the picture, of what is published."""
    model, path = published("generate"), PUBLISHED / PEERS
    peers = readme_peers.read(path) if path.exists() else None
    if path.exists() and not peers:
        raise ValueError(f"benchmarks.readme: {path}: expected JSON written by benchmarks.peers, got something else")
    return section(model, published("ops"), published("ops_kept"), peers), picture.of_model(model)


def publish(paths: Sequence[str | Path]) -> None:
    """Copies results without their single rounds; the name says their kind. Nothing is copied if one raises."""
    targets = {}
    for path in paths:
        if peers := readme_peers.read(path):
            targets[PEERS] = readme_peers.to_publish(peers)
            continue
        results = report.read_file(path)
        if results["kind"] not in ("ops", "generate") or not results.get("made_by"):
            raise ValueError(
                f"benchmarks.readme: {path} must be written by gpt2fast bench, benchmarks.generate or benchmarks.peers"
            )
        kept = results["kind"] == "ops" and results["machine"]["freed_memory_kept"]
        rows = [{name: value for name, value in row.items() if name != "rounds"} for row in results["rows"]]
        targets[f"cpu_{results['kind']}{'_kept' if kept else ''}.json"] = results | dict(rows=rows)
    for name, results in targets.items():
        (PUBLISHED / name).write_text(json.dumps(results, separators=(",", ":")) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__.split("\n")[0])
    parser.add_argument("--publish", nargs="+", metavar="FILE", default=[], help="results to publish first")
    args = parser.parse_args(argv)
    try:
        publish(args.publish)
    except ValueError as error:
        parser.error(str(error))
    text, drawn = made()
    readme = ROOT / "README.md"
    before, _, after = readme.read_text(encoding="utf-8").split(MARK)
    readme.write_text(MARK.join((before, f"\n{text}\n", after)), encoding="utf-8")
    (PUBLISHED / "cpu.svg").write_text(drawn, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
