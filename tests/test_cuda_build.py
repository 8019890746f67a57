"""What nvcc said of the CUDA kernels: `make cuda` compiles them and leaves it in build/objects/cuda."""

import re
from pathlib import Path

import pytest

REPORTS = sorted(Path(__file__).parents[1].glob("build/objects/cuda/*.ptxas"))
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w*persistent\w*)' for '(?P<architecture>\w+)'.*?"
    r"(?P<spilled>\d+) bytes spill stores.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)
# Without tensor cores a thread also reads the columns of others: a few words may go to memory.
MOST_SPILLED = {"Ffma": 32, "TensorCore": 4}  # bytes: eight words, and one


def kernels():
    return [match for report in REPORTS for match in KERNEL.finditer(report.read_text())]


@pytest.mark.skipif(not REPORTS, reason="the CUDA kernels are not compiled here: make cuda")
def test_the_weights_stay_in_registers():
    found = kernels()
    assert {m["architecture"] for m in found} >= {"sm_80", "sm_90"}
    assert {report.stem for report in REPORTS} >= {"lstm", "gru", "rnn_tanh", "rnn_relu"}
    for multiply, most in MOST_SPILLED.items():
        of_this = [m for m in found if multiply in m["name"]]
        assert of_this
        spilled = {m["name"] + " " + m["architecture"]: int(m["spilled"]) for m in of_this}
        assert max(spilled.values()) <= most, {name: n for name, n in spilled.items() if n > most}
