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

OPTIMIZE = "-O1"  # compiled in half the time
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


RELAY = self_test("meet_at_every_step")
RELAY_RACES = self_test("meet_at_every_step and fifo", "thread")
RELAY_BOUNDS = self_test("meet_at_every_step and fifo", "address")
ARRIVE = "  __syncthreads();\n  if (threadIdx.x == 0) {\n    dev::add_release(counter, 1);"
LEAVE = "n);\n  }\n  __syncthreads();\n"
PRIMITIVES = "testing/primitives.cuh"

# What the runner is tried on: a kernel of the machine's own tests, broken in the ways that kernels break.
SAMPLE = [
    Mutant("sample: no barrier before the count", PRIMITIVES, ARRIVE, ARRIVE[19:], RELAY),
    Mutant("sample: no barrier before the count, race", PRIMITIVES, ARRIVE, ARRIVE[19:], RELAY_RACES),
    Mutant("sample: no barrier after the wait, race", PRIMITIVES, LEAVE, "n);\n  }\n", RELAY_RACES),
    Mutant("sample: the grid does not meet", PRIMITIVES, "    meet_grid(counter, t + 1);", "", RELAY),
    Mutant("sample: waits for one block too few", PRIMITIVES, "* gridDim.x, n)", "* gridDim.x - 1, n)",
           RELAY),
    Mutant("sample: counts by a plain store", PRIMITIVES, "dev::add_release(counter, 1)", "*counter += 1",
           RELAY),
    Mutant("sample: one buffer for two steps", PRIMITIVES, "exchange + t % 2 * n", "exchange", RELAY),
    Mutant("sample: neighbours overwritten, race", PRIMITIVES,
           "    __syncthreads();  // neighbours have been read\n", "", RELAY_RACES),
    Mutant("sample: some threads miss a barrier", PRIMITIVES,
           "    __syncthreads();  // neighbours have been read\n", "    if (i % 5) __syncthreads();\n",
           RELAY),
    Mutant("sample: shared memory overread", PRIMITIVES, "neighbours[blockDim.x - 1 - threadIdx.x] +",
           "neighbours[blockDim.x - 1 - threadIdx.x] + (neighbours[blockDim.x] == 7) +", RELAY_BOUNDS),
    Mutant("sample: global memory overread", PRIMITIVES, "+ (i + 37) % n / 4)", "+ (i + 37) / 4)",
           RELAY_BOUNDS),
    Mutant("sample: words of a tile exchanged", PRIMITIVES, "v % 2 * 16 + v / 2 % 2 * 8 + v / 4 * 128",
           "v % 2 * 16 + v / 4 * 8 + v / 2 % 2 * 128", self_test("mma and fifo")),
]  # fmt: skip
KERNELS: list[Mutant] = []
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
                shutil.copy2(original, out)
    return build(mutant.tests.sanitizer, tree, out, OPTIMIZE, mutant.tests.cells)


def test(tests: Tests, module: Path) -> str:
    """What the tests say: nothing if they pass."""
    command = test_command("-x", "-q", "--no-header", *tests.arguments)
    environ = environment(tests.sanitizer, module) | {"PYTHONPATH": str(ROOT)}
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
