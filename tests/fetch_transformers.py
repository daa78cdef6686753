"""Prints the path of transformers' own common model tests. They are fetched once, from its source package, into the
cache."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

from fetch_ranks import cache_folder, download

MEMBER = "tests/test_modeling_common.py"


def model_tests(fetch: bool = True) -> Path:
    """The file of the installed version of transformers. Raises OSError, which says why there is none."""
    version = importlib.metadata.version("transformers")
    path = cache_folder() / f"transformers-{version}" / MEMBER
    if not path.is_file():
        if not fetch:
            raise OSError(
                f"transformers' tests are not on this machine; `python tests/{Path(__file__).name}` fetches them"
            )
        content = download(f"transformers=={version}", MEMBER)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_bytes(content)
        beside.replace(path)
    return path


if __name__ == "__main__":
    try:
        print(model_tests())
    except (OSError, subprocess.SubprocessError) as error:
        sys.exit(f"fetch_transformers: {error}")
