"""The README's numbers and picture are those of benchmarks/published, which says where they come from."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from gpt2fast.benchmarks import picture, readme, readme_peers, report

FILES = sorted(readme.PUBLISHED.glob("cpu_*.json"))


def test_the_readme_has_what_is_published():
    text, drawn = readme.made()
    parts = (readme.ROOT / "README.md").read_text(encoding="utf-8").split(readme.MARK)
    assert len(parts) == 3 and parts[1] == f"\n{text}\n", "run python -m benchmarks.readme"
    assert (readme.PUBLISHED / "cpu.svg").read_text(encoding="utf-8") == drawn
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith(("|", "!")))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_published_says_where_it_comes_from(path):
    peers = path.name == readme.PEERS
    results = readme_peers.read(path) if peers else report.read_file(path)
    made_by = results["made_by"]
    assert set(made_by) == {"date", "command", "versions"} and made_by["versions"]["torch"]
    assert "--quick" not in made_by["command"] and "/" not in made_by["command"]
    assert results["machine"]["cpu"] and results["rows"]
    assert not any("failed" in row or (readme_peers.SINGLE if peers else "rounds") in row for row in results["rows"])
    assert str(readme.ROOT) not in path.read_text(encoding="utf-8")


def test_a_case_that_is_not_published_is_named(tmp_path, monkeypatch):
    rows = json.loads((readme.PUBLISHED / "cpu_ops.json").read_text())["rows"]
    without = [row for row in rows if row["op"] != "attention"]
    with pytest.raises(ValueError, match=r"the published results lack attention, B4·T1024·S1024·H12·D64, float32"):
        readme.ops_table(without, readme.ON_THE_WAY)
    with pytest.raises(ValueError, match="h100.json must be written by gpt2fast bench, benchmarks.generate"):
        readme.publish([readme.PUBLISHED / "h100.json"])


def test_the_picture_is_whole():
    """Well-formed; every text begins and ends inside, by the width of its letters; a row for every ratio."""
    results = readme.published("generate")
    root = ElementTree.fromstring(picture.of_model(results))
    _, _, width, height = map(float, root.get("viewBox").split())
    texts = root.findall("{*}text")
    assert len(texts) >= 3 * sum(len(row["ratio"]) for row in results["rows"])
    for text in texts:
        size = 7.2 * len(text.text)
        at = float(text.get("x")) - {"start": 0, "middle": size / 2, "end": size}[text.get("text-anchor")]
        assert at >= 0 and at + size <= width and 0 < float(text.get("y")) < height, text.text
