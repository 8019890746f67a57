"""``python -m fastrnn``: the command line, one module per command, imported only when asked for."""

import importlib
import sys

COMMANDS = {
    "doctor": "check the build, the machine and the installation",
    "bench": "measure fastrnn beside torch.nn",
    "train": "train a sequence model from a configuration",
}
MODULES = {"doctor": "fastrnn.doctor", "bench": "fastrnn.bench", "train": "fastrnn.training.cli"}


def main(argv: list[str]) -> int:
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help"):
        print("usage: python -m fastrnn {doctor,bench,train} ...\n")
        print("\n".join(f"  {name:8}{text}" for name, text in COMMANDS.items()))
        return 0
    if command not in COMMANDS:
        print(f"fastrnn: no command {command!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(MODULES[command])
    except ModuleNotFoundError as missing:
        print(f"fastrnn: {missing}", file=sys.stderr)
        return 2
    return module.main(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
