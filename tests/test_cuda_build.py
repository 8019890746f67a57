"""Registers and spills of the CUDA kernels, as nvcc reported them to `make cuda` (build/objects/cuda)."""

import re
from pathlib import Path

import pytest

from fastrnn.reference import CELLS

REPORTS = sorted(Path(__file__).parents[1].glob("build/objects/cuda/*.ptxas"))
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w*persistent\w*)' for '(?P<architecture>\w+)'.*?"
    r"(?P<spilled>\d+) bytes spill stores.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
# Spilled bytes that are allowed, by the first of these words in a kernel's name. Without tensor cores a
# thread also reads other threads' columns, and peepholes and their gradients take registers too.
MOST_SPILLED = {"Slstm": 216, "Ffma": 32, "TensorCore": 4}  # of four states; eight words; one


def kernels():
    return [match for report in REPORTS for match in KERNEL.finditer(report.read_text())]


@pytest.mark.skipif(not REPORTS, reason="the CUDA kernels are not compiled here: make cuda")
def test_the_weights_stay_in_registers():
    found = kernels()
    assert "sm_90" in {m["architecture"] for m in found}
    assert {report.stem for report in REPORTS} >= set(CELLS)
    spilled = {m["name"] + " " + m["architecture"]: int(m["spilled"]) for m in found}
    allowed = {name: next(n for part, n in MOST_SPILLED.items() if part in name) for name in spilled}
    assert set(allowed.values()) == set(MOST_SPILLED.values())
    assert not {name: n for name, n in spilled.items() if n > allowed[name]}
