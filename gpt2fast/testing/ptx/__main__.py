"""``python -m gpt2fast.testing.ptx`` compiles the PTX machine where that is needed, and prints where its library is.

With ``--check``, it compiles nothing and exits with 1 where the machine is neither built nor in the cache.
"""

import argparse
import sys

from . import core
from .toolchain import WHAT


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gpt2fast.testing.ptx", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compile nothing; exit with 1 where it is not compiled")
    if parser.parse_args(arguments).check:
        found = core.find()
        print(found or f"{WHAT}: the PTX machine is not compiled: {core.HOW}", file=sys.stdout if found else sys.stderr)
        return int(found is None)
    try:
        path = core.file()
        core.load()
    except (OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
