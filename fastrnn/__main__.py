"""``python -m fastrnn``: the command line, one module per command, imported only when asked for."""

import contextlib
import importlib
import locale
import os
import sys

COMMANDS = {
    "doctor": "check the build, the machine and the installation",
    "bench": "measure fastrnn beside torch.nn",
    "train": "train a sequence model from a configuration",
}
MODULES = {"doctor": "fastrnn.doctor", "bench": "fastrnn.bench", "train": "fastrnn.training.cli"}


def speak_utf8() -> None:
    """Files are UTF-8 whatever the locale; a terminal shows what it cannot encode as an escape.

    Libraries open files in the locale's encoding, so the locale is changed, not each call; names of files
    keep the encoding that Python began with, and with ASCII it begins again. A stream that was closed
    becomes the null device: its number would otherwise go to the next file that is opened.
    """
    if sys.getfilesystemencoding() == "ascii":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    with contextlib.suppress(locale.Error):
        locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


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
    speak_utf8()
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("fastrnn: interrupted", file=sys.stderr)
        sys.exit(130)
