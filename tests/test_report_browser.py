"""The page of results in headless Chromium: nothing overlaps or is cut off at any width, and the filter filters."""

import base64
import html
import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from test_report import all_results

from gpt2fast.benchmarks import drawings, page, report

PROBE = Path(__file__).parent / "page_probe.js"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
in_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install --no-install-recommends chromium")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-extensions")
CATCH = """<head><script>window.foundErrors = [];
addEventListener("error", (event) => foundErrors.push(event.message || event.target.outerHTML), true);</script>"""


WIDTHS = (390, 768, 1200)  # pixels of a phone, a tablet and a screen


def opened(pages: dict[str, tuple[str, int]], folder: Path) -> dict[str, dict]:
    """What page_probe.js finds on pages (HTML, width). Each page is in a frame of its width, since a window cannot be
    so narrow."""
    frames = []
    for name, (text, width) in pages.items():
        probe = f"<script>{PROBE.read_text()}</script></body>"
        text = html.escape(text.replace("<head>", CATCH).replace("</body>", probe))
        frames.append(
            f'<iframe id="{name}" style="width: {width}px; height: 900px; border: 0" srcdoc="{text}"></iframe>'
        )
    host = folder / "host.html"
    host.write_text(f'<!doctype html><meta charset="utf-8"><body>{"".join(frames)}</body>', encoding="utf-8")
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", host.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = dict(re.findall(r'<pre id="(\w+)">([^<]+)</pre>', done.stdout))
    assert set(found) == set(pages), f"a probe did not end:\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"
    return {name: json.loads(base64.b64decode(text)) for name, text in found.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A page with every section there is."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    report.write_page(all_results(), path)
    return path


@pytest.fixture(scope="module")
def facts(whole, tmp_path_factory) -> dict[str, dict]:
    """What was found on the whole page, by width, and as "broken" on a page whose labels may lie anywhere."""
    folder = tmp_path_factory.mktemp("browser")
    pages = {f"at{width}": (whole.read_text(encoding="utf-8"), width) for width in WIDTHS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawings.Frame, "free", lambda self, box: True)
        pages["broken"] = page.to_html(dict(ops=all_results()["ops"]), []), 1200
    return opened(pages, folder)


@in_browser
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overlaps_or_is_cut_off(facts, width):
    found = facts[f"at{width}"]
    assert found["inner"] == width and found["scroll"] <= width
    assert found["headings"] >= 12 and found["tables"] >= 10 and found["drawings"] == 1
    for kind in ("overlaps", "crossed", "outside", "clipped", "small", "errors", "requests"):
        assert found[kind] == [], kind
    assert found["wide"] == found["unscoped"] == found["unnamed"] == 0
    assert [name for name, count in Counter(found["ids"]).items() if count > 1] == []


@in_browser
def test_labels_that_overlap_are_found(facts):
    assert facts["broken"]["overlaps"]


@in_browser
def test_the_filter_shows_what_fits_and_hides_the_rest(facts):
    found = facts["at1200"]["filters"]
    assert {name: result["wrong"] for name, result in found.items()} == dict.fromkeys(found, 0)
    nothing = found["nothing"]
    total = nothing["shown"]
    assert nothing["said"] == f"{total} of {total} rows" and nothing["none"] == 0 and found["again"] == nothing
    for name in ("words", "dtype", "architecture"):
        assert 0 < found[name]["shown"] < total and found[name]["said"] == f"{found[name]['shown']} of {total} rows"
    for name in ("words", "dtype"):
        assert 0 < found[name]["points"] < nothing["points"] and 0 < found[name]["bars"] < nothing["bars"]
    kernels, one = nothing["sections"]["kernels"], found["architecture"]["sections"]["kernels"]
    assert kernels == 3 * one and found["architecture"]["sections"]["ops"] == nothing["sections"]["ops"]
    assert list(found["section"]["sections"]) == ["parity"]
    assert found["unknown"]["shown"] == found["unknown"]["points"] == 0 and found["unknown"]["none"] >= 10


def test_the_page_is_whole_without_scripts_and_fetches_nothing(whole):
    text = whole.read_text(encoding="utf-8")
    without = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert "<form" in without and re.search(r"<form[^>]* hidden>", without), "a filter that does nothing is not shown"
    assert without.count("<tr") > 300 and without.count("<title") > 100
    assert not re.search(r"""(?:src|href)="(?!#)|url\((?!#)|@import|https?:""", text)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text


def test_a_name_that_is_html_is_text(tmp_path):
    found = all_results()
    found["ops"]["rows"][0]["op"] = '<img src=x onerror="x">'
    found["ops"]["machine"]["cpu"] = "<b>A & B</b>"
    report.write_page(found, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<img" not in text and "<b>A" not in text and "&lt;b&gt;A &amp; B&lt;/b&gt;" in text


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_stands_out_on_a_light_and_a_dark_screen():
    """WCAG 2 asks for a contrast of 4.5."""
    style = (page.HERE / "page.css").read_text(encoding="utf-8")
    themes = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", style, re.S)]
    assert len(themes) == 3 and themes[0] != themes[1]
    for theme in themes[:2]:
        for ink in ("ink", "quiet", "ours", "other", "bad"):
            for ground in ("paper", "panel"):
                dark, light = sorted(luminance(theme[name]) for name in (ink, ground))
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, ground, theme)
