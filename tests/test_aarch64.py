"""The kernels without torch, cross-compiled for aarch64 (NEON by the compiler's vector types) and run under
qemu, give the reference's results.

Needs Debian's g++-aarch64-linux-gnu and qemu-user; skipped where they are missing.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from scans import Scan

from fastrnn import _operators
from fastrnn.reference import CELLS

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = [f"cpu/{name}.cpp" for name in ("kernels_baseline", "instruction_set", "memory", "plan", "team")]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
missing = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)}")


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    program = tmp_path_factory.mktemp("aarch64") / "drive"
    flags = [
        "-std=c++20",
        "-O2",
        "-static",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-pthread",
        "-I.",
    ]
    command = [COMPILER, *flags, "-o", str(program), "testing/drive.cpp", *SOURCES]
    subprocess.run(command, cwd=CSRC, check=True)
    return program


def filled(array, scale, *shape):
    """What drive.cpp puts into an array: the same numbers on every machine."""
    i = torch.arange(torch.Size(shape).numel()) + array * 1000003
    return ((i * 2654435761 % 2**32).double() / 2**31 - 1).mul(scale).view(shape)


def make(name, T, B, I, H, P):
    cell, G, W = CELLS[name], CELLS[name].gates, P or H
    others, takes_x = cell.states - 1, not cell.takes_gates
    return Scan(
        name, filled(1, 1, T * B, I if takes_x else G * H), filled(2, 1, 1, B, W),
        filled(3, 1, 1, B, H).repeat(1, 1, others) if others else None,
        [filled(4, 0.3, G * H, I)] if takes_x else [], [filled(5, 0.3, G * H, W)] if cell.dense else [],
        [filled(6, 1, G * H)] if takes_x else [], [filled(7, 1, G * H)] if takes_x and cell.dense else [],
        [filled(8, 0.3, W, H)] if P else [],
        [filled(10, 0.3, cell.vectors, H)] if cell.vectors else [], None, None, None, False,
    )  # fmt: skip


def expected(scan):
    """What drive.cpp prints, from the reference in float64."""
    outputs = scan.reference()
    y, h_n, c_n = outputs[:3]
    dy = filled(9, 1, *y.shape)
    dgates, dh0, dc0, _, _, du = scan.reference_backward(outputs, (dy, None, None, None, None))
    inputs = not CELLS[scan.name].takes_gates
    dx, dweights = _operators.composed_weight_gradients(
        scan.name, dgates, scan.x, y, scan.states, *_operators.given(scan.slots), *scan.rows, inputs, True
    )
    others = CELLS[scan.name].states - 1
    c_n, dc0 = (t.chunk(others, -1) if others else () for t in (c_n, dc0))
    return [y, h_n, *c_n, dgates, dh0, *dc0, *dx, *dweights, *([du] if scan.u else [])]


# Few rows and one step in place, turned tiles, packed panels, ragged blocks, a projection, two threads.
SHAPES = [(1, 1, 3, 5, 0), (2, 3, 7, 20, 0), (1, 16, 9, 33, 0), (12, 9, 8, 17, 0), (5, 6, 4, 20, 9)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 3e-5), ("f64", 1e-12)])
def test_aarch64_kernels_equal_the_reference(drive, name, shape, threads, dtype, tolerance):
    T, B, I, H, P = shape
    if P and CELLS[name].hidden is None:
        pytest.skip("this cell has no projection")
    command = [EMULATOR, drive, name, dtype, *shape, threads]
    printed = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout
    numbers = torch.tensor([float(line) for line in printed.split()], dtype=torch.float64)
    wanted = expected(make(name, T, B, I, H, P))
    if name == "slstm":
        tolerance *= 4  # n begins near 0 in some units, and h is c / n
    for got, want in zip(numbers.split([w.numel() for w in wanted]), wanted, strict=True):
        assert (got - want.flatten()).abs().max() <= tolerance * want.abs().max().clamp_min(1)
