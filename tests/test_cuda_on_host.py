"""The machine that CUDA kernels run on in the tests: what it computes, in which orders, and what it notices.

``python tests/cuda_on_host.py thread tests/test_cuda_on_host.py`` runs these tests under ThreadSanitizer, and
``address`` under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from cuda_on_host import SCHEDULES

pytestmark = pytest.mark.filterwarnings("error")
FORMATS = ("bf16", "f16", "tf32")


@pytest.fixture(params=SCHEDULES, ids=lambda s: f"{s[0]}-{s[1]}")
def schedule(request, on_host):
    return on_host.Schedule(*request.param)


def rounded(format, x):
    """By torch, and for tf32 by the definition: 10 bits of mantissa, halves away from zero."""
    if format == "tf32":
        mantissa, exponent = np.frexp(x.astype(np.float64))
        mantissa = np.copysign(np.floor(np.abs(mantissa) * 2**11 + 0.5) / 2**11, mantissa)
        with np.errstate(over="ignore"):
            return np.ldexp(mantissa, exponent).astype(np.float32)
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[format]
    return torch.from_numpy(x).to(dtype).float().numpy()


# ---- what the device computes --------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_numbers_are_rounded_as_on_the_device(on_host, format):
    r = np.random.default_rng(0)
    x = r.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    halves = (r.integers(0, 2**16, 20_000, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    x = np.concatenate([x, halves, r.normal(size=50_000).astype(np.float32)])
    x = x[np.abs(x) > 1e-37] if format == "tf32" else x  # frexp counts the bits of a denormal otherwise
    y, expected = on_host.round_numbers(format, x), rounded(format, x)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
    np.testing.assert_array_equal(y[~np.isnan(x)], expected[~np.isnan(x)])


@pytest.mark.parametrize("format", FORMATS)
def test_mma_multiplies_the_tiles_that_its_lanes_hold(on_host, schedule, format):
    r = np.random.default_rng(1)
    K = 8 if format == "tf32" else 16
    for _ in range(5):
        a, b, d = (r.normal(size=shape).astype(np.float32) for shape in ((K, 16), (K, 8), (8, 16)))
        exact = d + rounded(format, b).astype(np.float64).T @ rounded(format, a).astype(np.float64)
        found = on_host.multiply_tile(format, a, b, d.copy(), schedule)
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5)


def test_shuffles_exchange_lanes(on_host, schedule):
    x = np.random.default_rng(2).normal(size=(3, 96)).astype(np.float32)
    for mask in (1, 2, 5, 16, 31):
        np.testing.assert_array_equal(on_host.exchange_lanes(x, mask, schedule), x[:, np.arange(96) ^ mask])


@pytest.mark.parametrize("cooperative", [False, True])
def test_every_thread_runs_once_and_knows_where_it_is(on_host, schedule, cooperative):
    grid, block = (3, 2, 4), (8, 4, 3)
    found = on_host.number_threads(grid, block, 0, cooperative, schedule)
    expected = np.array(
        [
            [(*reversed(thread), *reversed(number)) for thread in np.ndindex(block[::-1])]
            for number in np.ndindex(grid[::-1])
        ]
    )
    np.testing.assert_array_equal(found, expected)


def relayed(values, steps):
    """What the kernel `relay` is to compute."""
    v, n = values.astype(np.uint64), values.size
    start = (np.arange(n) + 37) % n // 4 * 4
    for _ in range(steps):
        flat = v.reshape(-1)
        far = sum((2 * k + 1) * flat[start + k] for k in range(4)).reshape(v.shape)
        v = (5 * v + v[:, ::-1] + far) & 0xFFFFFFFF
    return v


@pytest.mark.parametrize(("blocks", "threads", "steps"), [(1, 32, 3), (3, 64, 9), (16, 96, 2)])
def test_blocks_meet_at_every_step(on_host, schedule, blocks, threads, steps):
    values = np.random.default_rng(3).integers(0, 2**32, (blocks, threads), dtype=np.uint32)
    found = on_host.relay(values.copy(), steps, True, schedule)
    np.testing.assert_array_equal(found, relayed(values, steps))


def test_memory_that_no_one_has_written_is_nan(on_host):
    assert np.isnan(on_host.unset_memory())


# ---- what is noticed -----------------------------------------------------------------------------------

HERE = r"block \d thread \d+ at primitives\.cpp:\d+: "
FAULTS = {  # what the message says
    "barrier at two places": HERE + r"__syncthreads: \d+ threads wait at __syncthreads at primitives",
    "exit before a barrier": HERE + r"(exits while \d+ threads wait at|__syncthreads: 1 threads have exited)",
    "barrier in half a warp": r"at primitives\.cpp:\d+.* (wait|exited)|deadlock",
    "shuffle with missing lanes": r"__shfl_xor_sync at primitives\.cpp",
    "shuffle of half a warp": HERE + "__shfl_xor_sync: only whole warps",
    "nobody counts": r"deadlock:\n  block 1 thread 3 in wait_until at primitives\.cpp:\d+ in step 17 "
    "for a counter to reach 1, which is 0",
    "misaligned shared memory": HERE + "shared: offset 4 is not a multiple of 16",
    "shared memory beyond its end": HERE + "shared: offset 272 of 256 bytes",
    "misaligned load": HERE + "load_l2: misaligned address",
    "operand not rounded": HERE + "mma_tf32: an operand is not rounded",
    "trap": HERE + "no way",
}  # fmt: skip
OVERRUN = "shared memory overrun"
SEEN = {  # what ends the program, and what the sanitizer says
    "address": {OVERRUN: "use-after-poison", "read past the end": "heap-buffer-overflow"},
    "thread": {
        "race in a block": "data race",
        "counts before it has written": "data race",
        "counts without order": "data race",
        "counts by a plain store": "data race",
    },
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_its_place(on_host, schedule, fault):
    with pytest.raises(RuntimeError) as error:
        on_host.commit(fault, schedule)
    assert re.search(FAULTS[fault], str(error.value)), error.value
    # and the next launch is none the worse for it
    values = np.arange(64, dtype=np.uint32).reshape(2, 32)
    np.testing.assert_array_equal(on_host.relay(values.copy(), 3, True, schedule), relayed(values, 3))


def test_what_is_written_beyond_shared_memory_is_noticed_without_a_sanitizer(on_host):
    if on_host.sanitizer == "address":
        pytest.skip("AddressSanitizer ends the program")
    with pytest.raises(RuntimeError, match="wrote outside its 256 bytes of shared memory"):
        on_host.commit(OVERRUN, on_host.Schedule())


def test_a_counter_set_by_a_plain_store_wakes_nobody(on_host):
    if on_host.sanitizer == "thread":
        pytest.skip("ThreadSanitizer reports it, and ends the program in the end")
    with pytest.raises(RuntimeError, match=r"in step 17 .* which is 1 by a plain store"):
        on_host.commit("counts by a plain store", on_host.Schedule("fifo"))


def test_the_schedules_find_a_barrier_that_blocks_do_not_share(on_host):
    values = np.arange(6 * 32, dtype=np.uint32).reshape(6, 32)
    with pytest.raises(RuntimeError, match="in step 1 for a counter to reach 6"):
        on_host.relay(values, 2, False, on_host.Schedule())  # not cooperative: not all are resident


def test_a_launch_that_a_device_refuses_is_refused(on_host):
    def launch(grid, block, shared_bytes=0, cooperative=False):
        on_host.number_threads((grid, 1, 1), (block, 1, 1), shared_bytes, cooperative)

    launch(133, 32)
    launch(132, 32, 1024, True)
    launch(1, 1024, 232448)
    for arguments, message in {
        (133, 32, 0, True): "132 blocks at most, got 133",
        (1, 32, 232449): "232448 bytes of shared memory, got 232449",
        (1, 48): "whole warps, at most 1024 threads, got 48",
        (1, 1056): "whole warps, at most 1024 threads, got 1056",
        (0, 32): "no blocks",
    }.items():
        with pytest.raises(RuntimeError, match=message):
            launch(*arguments)


def test_a_launch_repeats_exactly(on_host):
    """What goes wrong, and who sees it first, is the same in every run of a schedule."""
    for order in ("random", "starve"):
        seen = []
        for seed in [*range(8)] * 2:
            with pytest.raises(RuntimeError) as error:
                on_host.commit("exit before a barrier", on_host.Schedule(order, seed))
            seen.append(str(error.value))
        assert seen[:8] == seen[8:]
        assert len(set(seen)) > 1


@pytest.mark.parametrize(("tool", "fault"), [(tool, fault) for tool, seen in SEEN.items() for fault in seen])
def test_the_sanitizer_sees_a_planted_fault(on_host, tool, fault):
    if on_host.sanitizer != tool:
        pytest.skip(f"the kernels are not compiled with the {tool} sanitizer")
    program = (
        "import sys; import cuda_on_host; module = cuda_on_host.load(sys.argv[1])\n"
        "module.commit(sys.argv[2], module.Schedule())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, on_host.__file__, fault],
        cwd=__file__.rpartition("/")[0], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode != 0
    assert SEEN[tool][fault] in done.stderr
    assert "primitives.cpp" in done.stderr
