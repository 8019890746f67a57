"""``python -m fastrnn bench``: fastrnn beside torch.nn, in alternating rounds in one process."""

import sys
from importlib import import_module
from importlib.util import find_spec


def main(argv: list[str]) -> int | None:
    missing = [name for name in ("rich", "matplotlib") if find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        print(f"fastrnn: bench needs {names}: pip install 'fastrnn[bench]'", file=sys.stderr)
        return 2
    command = argv[0] if argv and argv[0] in ("compare", "scaling") else "run"
    module = import_module(f"fastrnn.bench.{command}")
    return getattr(module, command)(argv[1:] if command != "run" else argv)
