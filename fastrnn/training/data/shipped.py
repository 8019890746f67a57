"""The data that ships with the package: each file is checked against its SHA-256 when it is read.

Provenance and licences are in ``files/manifest.json``; ``rebuild.py`` makes the files again.
"""

import hashlib
import json
import lzma
from pathlib import Path

from fastrnn.training.errors import InputError

FILES = Path(__file__).parent / "files"


def read(name: str) -> str:
    """The text of a shipped file such as ``"co2.csv"``.

    Raises:
        InputError: no such file, or its bytes are not the ones that were shipped.
    """
    manifest = json.loads((FILES / "manifest.json").read_text(encoding="utf-8"))
    if name not in manifest:
        raise InputError(f"no shipped data {name!r}; there are {', '.join(sorted(manifest))}")
    packed = (FILES / f"{name}.xz").read_bytes()
    found, wanted = hashlib.sha256(packed).hexdigest(), manifest[name]["sha256"]
    if found != wanted:
        raise InputError(f"{name}.xz is damaged: SHA-256 is {found}, expected {wanted}; reinstall fastrnn")
    return lzma.decompress(packed).decode("utf-8")
