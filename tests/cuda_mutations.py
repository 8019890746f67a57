"""Breaks the CUDA kernels on purpose, in one place at a time: the tests must notice each time.

    python tests/cuda_mutations.py [WORDS]        only mutants with these words in their names

Ends non-zero if a mutant survives. A change of the kernels that takes away a mutant's text is an error: the
list is to follow the kernels.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cuda_on_host import BUILD, CSRC, ROOT, build, environment, test_command

OPTIMIZE = "-O0"  # compiled in a third of the time
TIMEOUT = 300  # seconds: a mutant may never end


@dataclass(frozen=True)
class Tests:
    """What is to notice."""

    arguments: tuple[str, ...]  # of pytest
    sanitizer: str = "plain"
    cells: tuple[str, ...] = ()  # whose kernels are needed: each takes a while to compile


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # under csrc
    text: str  # occurs once
    replacement: str
    tests: Tests


def self_test(name: str, sanitizer: str = "plain") -> Tests:
    return Tests(("tests/test_cuda_on_host.py", "-k", name), sanitizer)


def kernels(cell: str, words: str, sanitizer: str = "plain") -> Tests:
    return Tests(("tests/test_cuda_kernels.py", "-k", words), sanitizer, (cell,))


RELAY = self_test("meet_at_every_step")
RELAY_RACES = self_test("meet_at_every_step and fifo", "thread")
ARRIVE = "  __syncthreads();\n  if (threadIdx.x == 0) {\n    dev::add_release(counter, 1);"
PRIMITIVES = "testing/primitives.cuh"

# What the runner is tried on: a kernel of the machine's own tests.
SAMPLE = [
    Mutant("sample: no barrier before the count", PRIMITIVES, ARRIVE, ARRIVE[19:], RELAY),
    Mutant("sample: no barrier before the count, race", PRIMITIVES, ARRIVE, ARRIVE[19:], RELAY_RACES),
    Mutant("sample: words of a tile exchanged", PRIMITIVES, "v % 2 * 16 + v / 2 % 2 * 8 + v / 4 * 128",
           "v % 2 * 16 + v / 4 * 8 + v / 2 % 2 * 128", self_test("mma and fifo")),
]  # fmt: skip

LSTM = kernels("lstm", "(lstm or projection) and not schedule")
GRU = kernels("gru", "(gru or replicas) and not schedule")
ORDERS = kernels("lstm", "lstm and (schedule or bf16)")  # of the threads
SPILLED = kernels("lstm", "shared_memory")
RACES = kernels("lstm", "lstm and bf16 and (one_block or many_blocks)", "thread")
BOUNDS = kernels("lstm", "lstm and (form or reference)", "address")

TILES, MULTIPLY, GEOMETRY = "cuda/tiles.cuh", "cuda/multiply.cuh", "cuda/geometry.h"
STEPS = "cuda/steps.cuh"
FORWARD, BACKWARD = "cuda/persistent_forward.cuh", "cuda/persistent_backward.cuh"
STEP, STEP_BACKWARD, DRIVER = "cuda/step.cuh", "cuda/backward_step.cuh", "cuda/driver.cuh"
BARRIER = "    __syncthreads();\n"
AFTER = "return exchange.load(q); });\n"  # the product

KERNELS = [
    # the blocks meet
    Mutant("arrive: no barrier before the count", TILES, BARRIER + "    if (!kOneBlock &&",
           "    if (!kOneBlock &&", ORDERS),
    Mutant("arrive: counts by a plain add", TILES, "dev::add_release(arrived_, 1)", "*arrived_ += 1", LSTM),
    Mutant("wait: one step early", TILES, "uint32_t(step + 1) *", "uint32_t(step) *", ORDERS),
    Mutant("wait: for one block too few", TILES, "uint32_t(g_.blocks), step", "uint32_t(g_.blocks - 1), step",
           ORDERS),
    Mutant("wait: by one thread alone, race", TILES, "step);\n" + BARRIER, "step);\n", RACES),
    Mutant("exchange: one buffer", TILES, "(step & 1)", "(step & 0)", ORDERS),
    Mutant("exchange: all replicas in one place", TILES, "place.direction * g.replicas + place.replica) * 2",
           "place.direction * g.replicas) * 2", GRU),
    Mutant("forward: no barrier after the product", FORWARD, AFTER + BARRIER, AFTER, ORDERS),
    Mutant("backward: no barrier after the product", BACKWARD, AFTER + BARRIER, AFTER, ORDERS),
    Mutant("backward: no barrier before the first step", BACKWARD, "  __syncthreads();\n\n", "", LSTM),
    # which part of the whole
    Mutant("place: units beyond H, overread", STEPS, "smaller(units_of_a_block, H - first_unit)",
           "units_of_a_block", BOUNDS),
    Mutant("place: replicas as far apart as whole tiles", STEPS, "replica * g.rows", "replica * g.batch",
           LSTM),
    Mutant("load: spilled tiles of a chunk in one place", TILES,
           "- kShape.resident) * kShape.row_tiles + m)", "- kShape.resident) * kShape.row_tiles)", SPILLED),
    Mutant("multiply: the next columns are those of now", TILES, "fetch(next, after,", "fetch(next, at,",
           LSTM),
    Mutant("multiply: one stage for all warps", TILES, "stage_(stage + warp_ *", "stage_(stage + 0 *", LSTM),
    Mutant("total: one depth warp missed", TILES, "int k = 0; k < depth_warps",
           "int k = 1; k < depth_warps", LSTM),
    Mutant("put: rows and columns exchanged", TILES,
           "M::sum_column(lane_, i) * stride + m * kTileRows + M::sum_row(lane_, i)",
           "M::sum_row(lane_, i) * stride + m * kTileRows + M::sum_column(lane_, i)", LSTM),
    # the product
    Mutant("multiply: words of a lane in another order", MULTIPLY, "i / 4 * 2 + (i / 2 & 1)",
           "i / 4 + (i / 2 & 1) * 2", LSTM),
    Mutant("multiply: halves of a sum do not meet", MULTIPLY, "s, 16)", "s, 8)", LSTM),
    Mutant("multiply: the first number of a word twice", MULTIPLY, "element(number(1)).bits) << 16",
           "element(number(0)).bits) << 16", LSTM),
    # shared memory and the exchange
    Mutant("geometry: sums run into what comes after", GEOMETRY, "g.depth_warps * g.batch * g.partial",
           "g.depth_warps * (g.batch - 4) * g.partial", LSTM),
    Mutant("geometry: too little shared memory", GEOMETRY, "2 * g.exchange_bytes() : 0",
           "2 * g.exchange_bytes() - 128 : 0", LSTM),
    Mutant("geometry: rows of the exchange overlap", GEOMETRY,
           "round_up(depth_warps * per_warp * 64, 128) + 64", "chunks * 64 - 64", LSTM),
    # forward
    Mutant("forward: the exchange is not cleared", FORWARD, "(here)[i] = 0", "(here)[i] |= 0", LSTM),
    Mutant("forward: no barrier after the exchange is cleared, race", FORWARD,
           "(here)[i] = 0;\n" + BARRIER, "(here)[i] = 0;\n", RACES),
    Mutant("forward: a reset does not reach the product", FORWARD,
           "steps.resets_if_any(step, b, offset[i]) ? 0.f : h[i]", "h[i]", LSTM),
    Mutant("forward: a reset of no row, overread", STEPS, "b < rows.active && sequence_", "sequence_",
           BOUNDS),
    Mutant("forward: a reset does not reach c", FORWARD, "h[i] = c[i] = 0;", "h[i] = 0;", LSTM),
    Mutant("forward: a reset does not reach h", FORWARD, "h[i] = c[i] = 0;", "c[i] = 0;", GRU),
    Mutant("forward: rows that have ended go on", FORWARD, "if (b < active) {", "if (b < place.rows) {",
           LSTM),
    Mutant("forward: rows that have ended are stored", FORWARD, "if (kOneBlock && b < active) keep",
           "if (kOneBlock) keep", LSTM),
    Mutant("forward: replicas count rows from 0", STEPS, "rows(t)) - first_row_", "rows(t))", GRU),
    Mutant("forward: no bias", FORWARD, ", a[gate] += bias[gate];", ";", LSTM),
    Mutant("forward: the input of another gate", FORWARD, "from[gate * H]", "from[(G - 1 - gate) * H]", LSTM),
    Mutant("forward: h0 in another order", FORWARD, "d.h0[batch]",
           "d.h0[place.first_row + mine.row(i)]", LSTM),
    # backward
    Mutant("backward: gates side by side, not in whole chunks", BACKWARD, "g.chunks / G * M::kInChunk;", "H;",
           LSTM),
    Mutant("backward: no direct gradient", BACKWARD, "sum[0] + direct[i]", "sum[0]", GRU),
    Mutant("backward: gradients of other gates", BACKWARD, "Cell::recurrent(gate)", "gate", GRU),
    Mutant("backward: the last product missed", BACKWARD,
           "if (steps.T > 0) recur(steps.T - 1, active_after);", "", LSTM),
    Mutant("backward: a reset does not stop the product", BACKWARD, "zero ? 0.f : dgates", "dgates", LSTM),
    Mutant("backward: rows that are yet to begin", BACKWARD,
           "if (mine.row(i) >= active) break;\n      float sum", "float sum", LSTM),
    # a step
    Mutant("step back: a reset does not stop dh and dc", STEP_BACKWARD, "if (begins) dh_prev = dc_prev = 0;",
           "", LSTM),
    Mutant("step back: a reset does not reach h", STEP_BACKWARD, "kDirect) before = begins ? A{} : ",
           "kDirect) before = ", GRU),
    Mutant("step back: a reset does not reach c", STEP_BACKWARD, "c_before = begins ? A{} : ", "c_before = ",
           LSTM),
    Mutant("step back: further gradients of another gate", STEP_BACKWARD, "d.dsaved[row])[s * H]",
           "d.dsaved[row])[0]", LSTM),
    Mutant("step back: dc of the step before", STEP_BACKWARD, "store<S>(dc);", "store<S>(dc_prev);", LSTM),
    Mutant("backward: rows begin a step late", BACKWARD, "b < before.active", "b <= before.active", LSTM),
    Mutant("backward: c0 in another order", BACKWARD, "steps.batch(b), H", "place.first_row + b, H", LSTM),
    Mutant("single steps: rows begin a step late", STEP, "rows(before) <= b", "rows(before) < b", LSTM),
    Mutant("single steps: a reset does not reach the product", STEP, "zero ? Acc<S>{} : p.states.h[",
           "p.states.h[", LSTM),
    Mutant("single steps: rows yet to begin are not reset", DRIVER, "one_thread_each(B * H)",
           "one_thread_each(n * H)", LSTM),
    Mutant("driver: one direction for both", DRIVER, "d == 0 ? host.T - 1 - step : step", "host.T - 1 - step",
           LSTM),
    Mutant("driver: rows of no step are not cleared", DRIVER, "clear({call.y, call.saved, call.saved_c})",
           "void()", LSTM),
    Mutant("driver: the exchange is not cleared", DRIVER, "device.clear(exchange, bytes);", "", LSTM),
]  # fmt: skip
MUTANTS = SAMPLE + KERNELS


def mutated(mutant: Mutant, work: Path) -> Path:
    """The module of a copy of the sources; objects that do not contain the change are the original's."""
    tree, out = work / "csrc", work / "build"
    shutil.copytree(CSRC, tree)
    source = (tree / mutant.file).read_text()
    if source.count(mutant.text) != 1:
        raise ValueError(
            f"{mutant.name}: {mutant.file} has {source.count(mutant.text)} times {mutant.text!r}"
        )
    (tree / mutant.file).write_text(source.replace(mutant.text, mutant.replacement))
    out.mkdir()
    for rule in BUILD.glob("*.d"):
        if str(CSRC / mutant.file) not in rule.read_text().split():
            for original in (rule, rule.with_suffix(".o")):
                (out / original.name).symlink_to(original)
    return build(mutant.tests.sanitizer, tree, out, OPTIMIZE, mutant.tests.cells)


def test(tests: Tests, module: Path) -> str:
    """What the tests say: nothing if they pass."""
    command = test_command("-x", "-q", "--no-header", *tests.arguments)
    environ = environment(tests.sanitizer, module) | {
        "PYTHONPATH": str(ROOT),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # a second each time
    }
    try:
        done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"did not end in {TIMEOUT} s"
    if done.returncode == 0:
        return ""
    if done.returncode in (2, 3, 4, 5):  # pytest's own: nothing was tested
        raise RuntimeError(" ".join(command) + "\n" + done.stdout + done.stderr)
    lines = reversed((done.stdout + done.stderr).splitlines())
    return next(
        (l for l in lines if l.startswith(("FAILED ", "SUMMARY: "))), f"exit status {done.returncode}"
    )


def judge(mutant: Mutant) -> tuple[str, float]:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        complaint = test(mutant.tests, mutated(mutant, Path(work)))
        return complaint.replace(f"{work}/", ""), time.monotonic() - start


def main(*words: str) -> int:
    mutants = [m for m in MUTANTS if all(word in m.name for word in words)]
    for tests in dict.fromkeys(m.tests for m in mutants):
        if complaint := test(tests, build(tests.sanitizer, optimize=OPTIMIZE, cells=tests.cells)):
            print(f"the kernels do not pass {tests}: {complaint}")
            return 1
    survivors = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, (complaint, seconds) in zip(mutants, pool.map(judge, mutants), strict=True):
            survivors += not complaint
            print(
                f"{mutant.name:45} {mutant.tests.sanitizer:8} {seconds:4.0f} s  {complaint or 'SURVIVES'}",
                flush=True,
            )
    print(f"{len(mutants)} mutants, {survivors} survive")
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
