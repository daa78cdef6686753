"""The progress line, and that the commands which take long show it."""

import io
import statistics

import pytest

from gpt2fast import cli
from gpt2fast.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def a_terminal(monkeypatch) -> Terminal:
    """Replaces standard error. A fixture cannot do it, because pytest replaces it once more before the test."""
    found = Terminal()
    monkeypatch.setattr("sys.stderr", found)
    return found


def test_the_line_is_written_over_and_ends(monkeypatch):
    terminal = a_terminal(monkeypatch)
    show = progress(3, lambda done, what: f"{done} of 3 {what}")
    for done in (1, 2, 3):
        show(done, "eggs")
    assert terminal.getvalue() == "1 of 3 eggs\r2 of 3 eggs\r3 of 3 eggs\n"


def test_nothing_without_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    assert progress(3, str) is None


@pytest.mark.parametrize("command, said", [
    (["eval", "--text", statistics.__file__, "--tokens", "600", "--weights", "int8"], "int8: 599 of 599 tokens\n"),
    (["pack", "OUT"], "packing as int8: 52 of 52 tensors\n"),
    (["generate", "--file", "FILE", "-n", "3"], "2 of 2 prompts, "),
])  # fmt: skip
def test_commands_show_it(monkeypatch, tmp_path, capsys, command, said):
    terminal = a_terminal(monkeypatch)
    (tmp_path / "prompts").write_text("import os\ndef main(\n")
    paths = dict(OUT=str(tmp_path / "out"), FILE=str(tmp_path / "prompts"))
    assert cli.main([paths.get(word, word) for word in command]) == 0
    assert said in terminal.getvalue() and "\r" in terminal.getvalue()
