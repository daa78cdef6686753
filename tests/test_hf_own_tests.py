"""transformers' own common model tests pass on our classes, unchanged."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from fetch_transformers import model_tests

FLAGS = ("-q", "--noconftest", "-p", "no:cacheprovider", "-o", "addopts=", "--tb=short", "-W", "ignore")


def test_common_model_tests(tmp_path):
    """Skipped tests need a GPU, another library, or a kind of model that GPT-2 is not."""
    try:
        model_tests(fetch=False)
    except OSError as error:
        pytest.skip(str(error))
    pytest.importorskip("parameterized")
    file = Path(__file__).with_name("own_tests.py")
    command = [sys.executable, "-m", "pytest", *FLAGS, f"--basetemp={tmp_path}", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=file.parent)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 100, done.stdout[-2000:]
