"""The objects of the instruction sets share nothing that the linker could mix.

A weak symbol in an AVX-512 object may be the copy that the linker keeps for everybody, and then the portable
kernels die on a processor without AVX-512.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARIES = sorted(ROOT.glob("build/**/libfastrnn_*.a")) + sorted(ROOT.glob("build/**/kernels_*.o"))
# Code and data that the linker may merge across objects: weak (W, w, V, v), unique (u), common (C).
MERGEABLE = set("WVuC")


def symbols(path):
    listing = subprocess.run(["nm", "-C", path], check=True, capture_output=True, text=True).stdout
    for line in listing.splitlines():
        fields = line.split(maxsplit=2)
        if len(fields) == 3:
            yield fields[1], fields[2]


pytestmark = [
    pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm"),
    pytest.mark.skipif(not LIBRARIES, reason="not built here"),
]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_an_instruction_set_exports_its_table_and_nothing_else(library):
    found = list(symbols(library))
    assert found
    mergeable = [name for kind, name in found if kind in MERGEABLE]
    assert not mergeable
    exported = [name for kind, name in found if kind in "TDBRG"]
    assert len(exported) == 1, exported
    assert "fastrnn::k" in exported[0]


@pytest.mark.parametrize("extension", sorted(ROOT.glob("fastrnn/_C*.so")), ids=lambda path: path.name)
def test_an_extension_exports_only_what_python_imports(extension):
    listing = subprocess.run(
        ["nm", "-DC", "--defined-only", extension], check=True, capture_output=True, text=True
    ).stdout
    names = [line.split(maxsplit=2)[2] for line in listing.splitlines()]
    ours = [n for n in names if n.startswith("fastrnn::")]
    assert not ours
    assert f"PyInit_{extension.name.split('.')[0]}" in names
