"""The CUDA kernels and their driver, on the CPU, against the reference in float64: every path, form and type
of numbers, under several schedules. ``tests/sanitize_cuda.sh`` runs part of them under sanitizers.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from scans import CELL_NAMES, FORMS, KINDS, make_scan

from fastrnn.reference import CELLS

HOST = torch.ops.fastrnn_cuda_on_host
ORDERS = {"fifo": 0, "lifo": 1, "random": 2, "starve": 3}
H200 = (132, 227 << 10)  # multiprocessors, bytes of shared memory of a block
NUMBERS = {
    "f64": (torch.float64, False, 1e-12),
    "f32": (torch.float32, False, 3e-6),
    "tf32": (torch.float32, True, 4e-3),
    "bf16": (torch.bfloat16, False, 3e-2),
    "f16": (torch.float16, False, 4e-3),
}  # name: dtype, tf32, how far a result may be from the reference's, beside the largest of that result


@dataclass(frozen=True)
class Device:
    """What runs the kernels: its size, and the order of its threads."""

    multiprocessors: int = H200[0]
    shared_bytes: int = H200[1]
    one_block: bool = True  # whether one may have all units
    order: str = "fifo"
    seed: int = 0
    resident: int = 2**31 - 1  # blocks of a cooperative grid that it holds at once
    where: str = "cpu"
    operators = HOST

    def take(self, numbers: str) -> None:
        """From now on the operators run on this device."""
        self.operators.configure(
            NUMBERS[numbers][1], self.multiprocessors, self.shared_bytes, self.one_block,
            ORDERS[self.order], self.seed, self.resident,
        )  # fmt: skip

    def plan(self, forward: bool, numbers: str, scan, T: int, B: int, H: int, D: int) -> str:
        return torch.ops.fastrnn.cuda_plan(
            forward, numbers, CELLS[scan.name].gates, T, B, H, D, bool(scan.w_hr),
            self.multiprocessors, self.shared_bytes,
        )  # fmt: skip


ONE_BLOCK = Device()
# Few multiprocessors, so that the rows of a block fill several tiles.
MANY_BLOCKS = Device(one_block=False, multiprocessors=9)
EACH_STEP = Device(multiprocessors=0)
PATHS = {"one_block": ONE_BLOCK, "many_blocks": MANY_BLOCKS, "each_step": EACH_STEP}


def close(numbers: str, name: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape, name
    if found.numel() == 0:
        return
    scale = max(1.0, expected.abs().max().item())
    error = (found.cpu().double() - expected).abs().max().item()
    assert error <= NUMBERS[numbers][2] * scale, f"{name}: {error:.1e} of {scale:.1e}"


def run(device: Device, numbers: str, scan, wanted: str = "all", save: int = 1) -> None:
    """Forward, and backward from the reference's own results, rounded as they would be stored."""
    dtype, operators = NUMBERS[numbers][0], device.operators
    device.take(numbers)
    exact = scan.map(lambda t: t.to(dtype).double())
    stored = exact.to(device.where, dtype)
    expected = exact.reference()
    found = stored.kernel(save, operators=operators)
    names = ("y", "h_n", "c_n", "saved", "saved_c")
    written = {0: names[:3], 1: names, 2: (*names[:3], "saved_c")}[save]
    for name, a, b in zip(names, found, expected, strict=True):
        if name in written:
            close(numbers, name, a, b)
        else:
            assert a.numel() == 0

    outputs = tuple(t.to(device.where, dtype) for t in expected)
    gradients = tuple(
        None if t is None else t.to(device.where, dtype) for t in exact.gradients(expected, wanted)
    )
    found = stored.kernel_backward(outputs, gradients, operators=operators)
    expected = exact.reference_backward(
        tuple(t.cpu().double() for t in outputs),
        tuple(None if t is None else t.cpu().double() for t in gradients),
    )
    for name, a, b in zip(("dgates", "dh0", "dc0", "dh", "dc", "du"), found, expected, strict=True):
        close(numbers, name, a, b)


@pytest.fixture
def unset_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


pytestmark = pytest.mark.usefixtures("on_host", "unset_memory_is_nan")


# ---- every path, number type and form ------------------------------------------------------------------


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("cell", CELL_NAMES)
def test_every_path_and_number_type_equals_the_reference(cell, path, numbers):
    T, B, H = 4, 9, 65
    scan = make_scan(cell, T, B, H)
    plans = {PATHS[path].plan(forward, numbers, scan, T, B, H, 1) for forward in (True, False)}
    expected = "each step" if path == "each_step" or numbers == "f64" else "persistent"
    assert all(expected in plan for plan in plans)
    if expected == "persistent" and path == "one_block":
        assert all("one block" in plan for plan in plans)
    run(PATHS[path], numbers, scan)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("cell", KINDS)
def test_every_form_in_both_directions(cell, path, form):
    run(PATHS[path], "f32", make_scan(cell, 5, 11, 33, D=2, **FORMS[form]))


@pytest.mark.parametrize("form", ["time_major", "lengths_batch_first", "packed"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("cell", [name for name, cell in CELLS.items() if cell.reuses_saved])
def test_gate_gradients_may_be_written_over_what_was_saved(cell, path, form):
    scan = make_scan(cell, 4, 7, 33, D=2, dtype=torch.float32, **FORMS[form])
    PATHS[path].take("f32")
    outputs = scan.kernel(operators=HOST)
    arguments = outputs, scan.gradients(outputs)
    expected = scan.kernel_backward(*arguments, operators=HOST)
    for a, b in zip(scan.kernel_backward_in_place(*arguments, operators=HOST), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", [1, 3, 7, 17, 65, 129])
@pytest.mark.parametrize("path", ["one_block", "many_blocks"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_odd_sizes(cell, path, size):
    run(PATHS[path], "bf16", make_scan(cell, 3, 5, size))
    run(PATHS[path], "f32", make_scan(cell, 2, size, 17))


def test_many_rows_are_shared_by_replicas():
    scan = make_scan("gru", 3, 70, 200)
    device = Device(multiprocessors=30)
    assert "13 blocks of 16 units, which meet once a step; 2 times, with 40 rows" in device.plan(
        True, "bf16", scan, 3, 70, 200, 1
    )
    run(device, "bf16", scan)


def test_a_grid_that_the_device_cannot_hold_at_once_is_scanned_in_single_steps(capfd):
    scan = make_scan("lstm", 3, 5, 65)
    for numbers in ("bf16", "f32"):
        run(MANY_BLOCKS, numbers, scan)
        assert capfd.readouterr().err == ""
    for numbers in ("bf16", "f32"):
        run(replace(MANY_BLOCKS, resident=1), numbers, scan)
    said = capfd.readouterr().err  # once a process
    assert said.count("cannot hold the 5 blocks of a scan at once") == 1


def test_weights_beyond_the_registers_are_in_shared_memory():
    for forward in (True, False):
        *_, spilled, _stride, _bytes = torch.ops.fastrnn.cuda_geometry(
            forward, "f32", 4, 2, 3, 400, 1, False, *H200
        )
        assert spilled > 0
    run(ONE_BLOCK, "f32", make_scan("lstm", 2, 3, 400))


@pytest.mark.parametrize("form", ["time_major", "lengths_batch_first", "packed"])
@pytest.mark.parametrize("numbers", NUMBERS)
def test_projection(numbers, form):
    run(ONE_BLOCK, numbers, make_scan("lstm", 4, 5, 17, D=2, P=7, **FORMS[form]))


@pytest.mark.parametrize("path", PATHS)
def test_no_bias_nothing_saved_and_few_gradients(path):
    run(PATHS[path], "f32", make_scan("lstm", 4, 3, 20, bias=False), wanted="y", save=0)
    run(PATHS[path], "f32", make_scan("gru", 4, 3, 20, bias=False), wanted="h", save=0)
    run(PATHS[path], "f32", make_scan("lstm", 4, 3, 20, D=2, lengths=True), wanted="y", save=2)
    run(PATHS[path], "f32", make_scan("lstm", 4, 3, 20), wanted="c")
    run(PATHS[path], "f32", make_scan("lstm", 4, 3, 20), wanted="all_c")


@pytest.mark.parametrize("cell", CELL_NAMES)
def test_one_step_and_no_rows(cell):
    run(ONE_BLOCK, "f32", make_scan(cell, 1, 5, 17))
    none = make_scan(cell, 3, 0, 17, D=2, dtype=torch.float32)
    outputs = none.kernel(operators=HOST)
    assert outputs[0].shape == (0, 34)
    assert torch.equal(outputs[1], none.h0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("cell", CELL_NAMES)
def test_not_a_number_stays_in_its_row(cell, path):
    scan = make_scan(cell, 3, 4, 20, dtype=torch.float32)
    scan.x[4 + 2, 0] = torch.nan  # of row 2, from step 1 on
    PATHS[path].take("f32")
    y = scan.kernel(0, operators=HOST)[0].view(3, 4, 20)
    broken = y.isnan().any(-1)
    assert broken.tolist() == [[False] * 4] + [[False, False, True, False]] * 2


# ---- schedules and repetition --------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("numbers", ["f32", "bf16"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_every_schedule_gives_the_same_bits(cell, numbers, order):
    scan = make_scan(cell, 4, 9, 40, D=2, lengths=True, reset=True, dtype=NUMBERS[numbers][0])
    found = []
    for device in (MANY_BLOCKS, replace(MANY_BLOCKS, order=order, seed=3)):
        device.take(numbers)
        outputs = scan.kernel(operators=HOST)
        gradients = scan.kernel_backward(outputs, scan.gradients(outputs), operators=HOST)
        found.append((*outputs, *gradients))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


# ---- the choice of path --------------------------------------------------------------------------------


def plan(gates, numbers, T, B, H, D=1, projected=False, forward=True, device=H200):
    return torch.ops.fastrnn.cuda_plan(forward, numbers, gates, T, B, H, D, projected, *device)


def test_small_layers_are_one_block_and_large_ones_what_fits_on_the_device():
    for numbers, H in (("bf16", 128), ("f16", 128), ("f32", 112), ("tf32", 128)):
        for forward in (True, False):
            assert "one block" in plan(4, numbers, 100, 8, H, forward=forward), (numbers, H, forward)
    for forward in (True, False):
        assert "persistent" in plan(4, "bf16", 100, 16, 2048, forward=forward)
        assert "no room" in plan(4, "bf16", 100, 16, 4096, forward=forward)
        assert "persistent" in plan(4, "bf16", 100, 64, 1024, D=2, forward=forward)


def test_every_reason_for_single_steps_is_said():
    assert "float64" in plan(4, "f64", 100, 8, 64)
    assert "projection" in plan(4, "bf16", 100, 8, 64, projected=True)
    assert "one step" in plan(4, "bf16", 1, 8, 64)
    assert "no room" in plan(4, "bf16", 100, 8, 64, device=(0, 0))
