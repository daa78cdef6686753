"""The README's table of other engines has every number of the published result, and is left out without one."""

import json
import shutil

import pytest

from gpt2fast.benchmarks import peers, readme, readme_peers

WORKS = {"decode": ([[1] * 32], 33), "batch": ([[1] * 32] * 8, 17), "prefill": ([[1] * 512], 1)}
COMMAND = (
    "python -m benchmarks.peers --engines gpt2fast,onnxruntime,openvino,ctranslate2,llama-cpp-python --rounds 3 "
    "--widths float32,int4 --out peers.json"
)


class NotInstalled(peers.LlamaCpp):
    modules = {"llama-cpp-python": "no_such_module"}


def row(work, width, seconds, refused=None):
    """A row as benchmarks.peers writes it, of the seconds of each engine in each round."""
    tokens, new = WORKS[work]
    what = "prefill" if new == 1 else "decode"
    turns = {
        name: [dict(turn=i, seconds={what: s}, read=[2e9, 4e9]) for i, s in enumerate(times)]
        for name, times in seconds.items()
    }
    agreement = dict.fromkeys(seconds, dict(tokens=8, same=6, near_ties=[{}], first_difference=None, height=1.0))
    known = dict(case=f"{len(tokens)}x{len(tokens[0])}", dtype=width, what=what, new=new, agreement=agreement)
    summary = peers.summary(turns, dict.fromkeys(seconds, 3e8), tokens, what, new)
    return known | dict(refused=refused or {}) | summary


@pytest.fixture
def found(tmp_path):
    """A run of four engines: in float32 all but one, which is not installed; in int4 one of the three has no weights
    and another one cannot load the model."""
    kinds = [peers.Gpt2fast, peers.OnnxRuntime, peers.OpenVino, peers.CTranslate2, NotInstalled]
    absent = {w: peers.start([kinds[-1]], w, 1, tmp_path, tmp_path)[1] for w in ("int4", "float32")}
    absent["int4"] |= peers.start([peers.CTranslate2], "int4", 1, tmp_path, tmp_path)[1]
    absent["int4"]["openvino"] = f"could not load the model: RuntimeError: no {tmp_path}/folder/model.xml"
    fast, slow = [2.0, 4.0, 2.0], [3.0, 8.0, 4.0]
    differs = "differs from transformers: row 0"
    return dict(
        kind="peers",
        made_by=dict(date="2026-01-02", command=COMMAND, versions=dict(torch="2.13.0", transformers="5.23.0")),
        machine=dict(cpu="A CPU", isa="avx2", threads=2),
        size="124M",
        rows=[
            row("decode", "int4", dict(gpt2fast=[2.0, 1.0, 2.0], onnxruntime=fast)),
            row("decode", "float32", dict(gpt2fast=slow, onnxruntime=fast, openvino=slow, ctranslate2=[30, 16, 8])),
            row("batch", "float32", dict(onnxruntime=fast), dict.fromkeys(("gpt2fast", "openvino"), differs)
                | dict(ctranslate2="RuntimeError: a bug")),
            row("prefill", "float32", dict(gpt2fast=fast, onnxruntime=slow, openvino=slow, ctranslate2=slow)),
        ],
        absent=absent,
        versions={kind.name: {kind.name: "1.2", "transformers": "5.23.0"} for kind in kinds[:-1]}
        | {"llama-cpp-python": {}},
    )  # fmt: skip


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A copy of README.md and of what is published, without a result of benchmarks.peers."""
    copy = tmp_path / "root"
    shutil.copytree(readme.PUBLISHED, copy / "published", ignore=shutil.ignore_patterns(readme.PEERS))
    shutil.copy(readme.ROOT / "README.md", copy)
    monkeypatch.setattr(readme, "ROOT", copy)
    monkeypatch.setattr(readme, "PUBLISHED", copy / "published")
    assert readme.main([]) == 0
    return copy


def written(path, results):
    path.write_text(json.dumps(results))
    return str(path)


def test_every_engine_of_benchmarks_peers_has_a_name():
    assert list(readme_peers.NAMES) == list(peers.ENGINES)


def test_the_table(found):
    assert readme_peers.table(found).splitlines() == [
        "| GPT-2 124M against other engines | weights | tokens/s | of the read bandwidth | × ONNX Runtime | × OpenVINO "
        "| × CTranslate2 |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        # 32 tokens in 4 seconds, each 3e8 bytes: 2.4e9 B/s of 3e9 B/s. The other engines by pairs, also below 1.
        "| decode after 32, batch 1 | float32 | 8.00 | 80 % | 0.50 × (0.50–0.67) | 1.00 × (1.00–1.00) "
        "| 2.00 × (2.00–10.0) |",
        "| decode after 32, batch 8 | float32 | not timed | – | 64.0 tokens/s | not timed | not timed |",
        "| prefill of 512, batch 1 | float32 | 256 | – | 2.00 × (1.50–2.00) | 2.00 × (1.50–2.00) "
        "| 2.00 × (1.50–2.00) |",
        "| decode after 32, batch 1 | int4 | 16.0 | 160 % | 1.00 × (1.00–4.00) | not run | – |",
    ]


def test_what_is_around_the_table(found):
    first, _, command, _, notes = readme_peers.parts(readme_peers.to_publish(found))
    for words in ("ONNX Runtime (onnxruntime 1.2), OpenVINO (openvino 1.2) and CTranslate2 (ctranslate2 1.2), on 2026-",
                  "A CPU (avx2), 2 threads for every engine, with torch 2.13.0 and transformers 5.23.0.",
                  "for 3 rounds."):  # fmt: skip
        assert words in first
    lines = command.splitlines()
    assert lines[0] == "```sh" and lines[-1] == "```" and len(lines) > 3 and max(map(len, lines)) <= 120
    assert "".join(lines[1:-1]).replace("\\    ", "") == COMMAND
    assert notes == (
        "Not run: OpenVINO in int4 (could not load the model: RuntimeError: no model.xml), llama.cpp (not installed). "
        "Not timed: gpt2fast at decode after 32, batch 8, float32: it differs from transformers: row 0. OpenVINO at "
        "decode after 32, batch 8, float32: it differs from transformers: row 0. CTranslate2 at decode after 32, batch "
        "8, float32: it failed with this message: RuntimeError: a bug. Tokens that are transformers' choice in "
        "float32, or a near-tie of it: int4: gpt2fast 88 % and ONNX Runtime 88 %. Weights and prompts are random, so "
        "these shares do not tell how good a trained model is."
    )


def test_shares_of_equal_tokens(found):
    """They are of the rows that all engines ran, and include engines that compute in fewer bits than their weights."""
    rows = found["rows"]
    rows.append(row("batch", "int4", dict(gpt2fast=[1.0] * 3)))
    rows[0]["agreement"]["onnxruntime"] = dict(tokens=8, same=2, near_ties=[])
    rows[1] = row("decode", "float32", {name: [1.0] * 3 for name in ("gpt2fast", "openvino", "llama-cpp-python")})
    assert readme_peers.same_tokens(found) == [
        "float32: llama.cpp 88 %.",
        "int4: gpt2fast 88 % and ONNX Runtime 25 %.",
        "ONNX Runtime chooses 25 % of them at decode after 32, batch 1, int4, where another engine chooses 88 %.",
    ]
    found["size"] = "my-model"
    assert not readme_peers.parts(found)[-1].endswith("trained model is.")


def test_engines_that_are_left_out_are_named(found):
    del found["versions"]["llama-cpp-python"]
    for absent in found["absent"].values():
        del absent["llama-cpp-python"]
    assert readme_peers.not_run(found)[-1] == "llama.cpp (left out)"
    only = found | dict(rows=found["rows"][:1], absent=dict(int4=found["absent"]["int4"]))
    assert readme_peers.columns(only) == ["onnxruntime"]
    assert readme_peers.not_run(only)[1] == "CTranslate2 (has no int4 weights)"


def test_publishing(found, root, tmp_path):
    before = (root / "README.md").read_text()
    path = written(tmp_path / "peers.json", found)
    assert "other engines" not in before and readme.main([]) == 0 and (root / "README.md").read_text() == before
    assert readme.main(["--publish", path]) == 0
    text, published = (root / "README.md").read_text(), root / "published" / readme.PEERS
    table = readme_peers.table(found)
    assert text.count(table) == 1 and text.split(readme.MARK)[1].count(table) == 1
    assert text.index("against transformers (sdpa)") < text.index(table) < text.index("against PyTorch's fused op")
    assert all(len(line) <= 120 for line in text.split(readme.MARK)[1].splitlines() if not line.startswith(("|", "!")))
    kept = json.loads(published.read_text())
    assert kept["rows"] == [
        {name: value for name, value in row.items() if name != readme_peers.SINGLE} for row in found["rows"]
    ]
    assert str(tmp_path) in json.dumps(found) and str(tmp_path) not in published.read_text()
    # What is published already has no single rounds, and can be published again.
    assert readme.main(["--publish", written(tmp_path / "again.json", kept)]) == 0
    assert json.loads(published.read_text()) == kept and (root / "README.md").read_text() == text
    published.unlink()
    assert readme.main([]) == 0 and (root / "README.md").read_text() == before


def test_only_names_of_files_are_kept(found):
    found["size"] = "/srv/models/gpt2"
    found["absent"]["int4"]["openvino"] = "no '/a/b/c.xml' in ~/d/e, a/b, 3 / 4, https://a.org/b/c"
    made = readme_peers.to_publish(found)
    assert made["size"] == "gpt2" and made["absent"]["int4"]["openvino"] == (
        "no 'c.xml' in e, a/b, 3 / 4, https://a.org/b/c"
    )


def test_results_without_a_table_are_refused(found, root, tmp_path, capsys):
    ours = found["versions"]["gpt2fast"]
    others = {name: found["versions"][name] for name in found["versions"] if name != "gpt2fast"}
    alone = [row("decode", "float32", dict(gpt2fast=[1.0]))]
    for wrong, message in [
        (found | dict(versions=others), "expected gpt2fast and at least one other engine that ran; the engines of the "
         "run are onnxruntime, openvino, ctranslate2 and llama-cpp-python"),
        (found | dict(versions=dict(gpt2fast=ours), rows=alone), "the engines of the run are gpt2fast: run "
         "benchmarks.peers with others by --engines"),
        (found | dict(rows=[], made_by=None), "got none of made_by, rows: run it with --out"),
        (dict(kind="pears"), "expected JSON written by benchmarks.ops"),
    ]:  # fmt: skip
        path = written(tmp_path / "wrong.json", wrong)
        with pytest.raises(SystemExit):
            readme.main(["--publish", str(root / "published" / "cpu_ops.json"), path])
        error = capsys.readouterr().err
        assert message in error and "wrong.json" in error
    assert not (root / "published" / readme.PEERS).exists()
    (root / "published" / readme.PEERS).write_text("[]")
    with pytest.raises(ValueError, match="cpu_peers.json: expected JSON written by benchmarks.peers"):
        readme.made()
