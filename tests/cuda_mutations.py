"""Breaks the CUDA kernels on purpose, in one place at a time: the tests must notice each time.

    python tests/cuda_mutations.py [WORDS]        only mutants with these words in their names

Ends non-zero if a mutant survives. Each stands beside the code that it breaks, which a comment marks with its
name: code that moves takes its mutants along. A marker without a mutant, or the reverse, is an error.
"""

import os
import re
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
    """The tests that must fail on a mutant."""

    arguments: tuple[str, ...]  # of pytest
    sanitizer: str = "plain"
    cells: tuple[str, ...] = ()  # the only cells to compile, because each takes a while


@dataclass(frozen=True)
class Mutant:
    """A fault in the line that the sources mark with ``// mutant: name``, or in the one below such a line."""

    name: str
    tests: Tests
    text: str = ""  # occurs once in that line; without it the whole line goes
    replacement: str = ""


def self_test(name: str, sanitizer: str = "plain") -> Tests:
    return Tests(("tests/test_cuda_on_host.py", "-k", name), sanitizer)


def kernels(cell: str, words: str, sanitizer: str = "plain") -> Tests:
    if cell == "lstm":  # these words are in the names of other cells' tests too
        words = f"({words}) and not lstm_ and not slstm"
    if cell == "gru":
        words = f"({words}) and not norm"
    return Tests(("tests/test_cuda_kernels.py", "-k", words), sanitizer, (cell,))


# Mutants of a kernel of the machine's own tests, to test this runner.
SAMPLE = [
    Mutant("relay-without-barrier", self_test("meet_at_every_step")),
    Mutant("relay-without-barrier-is-a-race", self_test("meet_at_every_step and fifo", "thread")),
    Mutant("tile-words-exchanged", self_test("mma and fifo"), "v / 2 % 2 * 8 + v / 4 * 128",
           "v / 4 * 8 + v / 2 % 2 * 128"),
]  # fmt: skip

LSTM = kernels("lstm", "(lstm or projection) and not schedule")
PEEPHOLE = kernels("lstm_peephole", "lstm_peephole and not schedule")
ALONE = kernels("indrnn_tanh", "indrnn_tanh and not schedule")
ROWS = kernels("lstm_layer_norm", "lstm_layer_norm and each_step and equals_the_reference and f32", "thread")
DIRECT = kernels("gru_layer_norm", "gru_layer_norm and form")
GRU = kernels("gru", "(gru or replicas) and not schedule")
ORDERS = kernels("lstm", "lstm and (schedule or bf16)")  # of the threads
SPILLED = kernels("lstm", "shared_memory")
TOO_LARGE = kernels("lstm", "cannot_hold_at_once")
RACES = kernels("lstm", "lstm and bf16 and (one_block or many_blocks)", "thread")
BOUNDS = kernels("lstm", "lstm and (form or reference)", "address")
OPTIONS = Tests(("tests/test_step_cuda.py", "-k", "each_option and GRU"), cells=("gru",))
LINEAR = Tests(("tests/test_linear_scan.py", "-k", "cuda"), cells=("gru",))

KERNELS = [
    # the blocks meet
    Mutant("arrive-without-barrier", ORDERS),
    Mutant("arrive-by-plain-add", LSTM, "dev::add_release(arrived_, 1)", "*arrived_ += 1"),
    Mutant("wait-one-step-early", ORDERS, "step + 1", "step"),
    Mutant("wait-for-one-block-too-few", ORDERS, "g_.blocks", "g_.blocks - 1"),
    Mutant("wait-by-one-thread", RACES),
    Mutant("exchange-one-buffer", ORDERS, "& 1", "& 0"),
    Mutant("exchange-of-all-replicas-in-one-place", GRU, " + place.replica", ""),
    Mutant("forward-without-barrier-after-product", ORDERS),
    Mutant("backward-without-barrier-after-product", ORDERS),
    Mutant("backward-without-barrier-before-steps", LSTM),
    # which part of the whole
    Mutant("units-beyond-H", BOUNDS, "smaller(units_of_a_block, H - first_unit)", "units_of_a_block"),
    Mutant("replicas-as-far-apart-as-tiles", LSTM, "g.rows", "g.batch"),
    Mutant("spilled-tiles-in-one-place", SPILLED, " + m", ""),
    Mutant("next-columns-are-those-of-now", LSTM, "after", "at"),
    Mutant("one-stage-for-all-warps", LSTM, "warp_", "0"),
    Mutant("total-misses-a-depth-warp", LSTM, "k = 0", "k = 1"),
    Mutant("sums-transposed", LSTM,
           "M::sum_column(lane_, i) * stride + m * kTileRows + M::sum_row(lane_, i)",
           "M::sum_row(lane_, i) * stride + m * kTileRows + M::sum_column(lane_, i)"),
    # the product
    Mutant("lane-words-in-another-order", LSTM, "i / 4 * 2 + (i / 2 & 1)", "i / 4 + (i / 2 & 1) * 2"),
    Mutant("halves-of-a-sum-do-not-meet", LSTM, "16", "8"),
    Mutant("first-number-of-a-word-twice", LSTM, "number(1)", "number(0)"),
    # shared memory and the exchange
    Mutant("sums-run-into-what-follows", LSTM, "g.batch", "(g.batch - 4)"),
    Mutant("too-little-shared-memory", LSTM, " : 0", " - 128 : 0"),
    Mutant("rows-of-the-exchange-overlap", LSTM, "round_up(depth_warps * per_warp * 64, 128) + 64",
           "chunks * 64 - 64"),
    # forward
    Mutant("forward-exchange-not-cleared", LSTM, "= 0", "|= 0"),
    Mutant("forward-without-barrier-after-clearing", RACES),
    Mutant("reset-does-not-reach-the-product", LSTM, "steps.resets_if_any(step, b, offset[i]) ? 0.f : ", ""),
    Mutant("reset-of-no-row", BOUNDS, "b < rows.active && ", ""),
    Mutant("reset-does-not-reach-c", LSTM, "zero", "k == kH && zero"),
    Mutant("reset-does-not-reach-h", GRU, "zero", "k != kH && zero"),
    Mutant("ended-rows-go-on", LSTM, "active", "place.rows"),
    Mutant("ended-rows-are-stored", LSTM, " && b < active", ""),
    Mutant("replicas-count-rows-from-0", GRU, " - first_row_", ""),
    Mutant("no-bias", LSTM, " + bias[gate]", ""),
    Mutant("input-of-another-gate", LSTM, "from[gate", "from[(G - 1 - gate)"),
    Mutant("h0-in-another-order", LSTM, "batch", "place.first_row + mine.row(i)"),
    # backward
    Mutant("gates-not-in-whole-chunks", LSTM, "g.chunks / G * M::kInChunk", "H"),
    Mutant("no-direct-gradient", GRU, " + direct[i]", ""),
    Mutant("gradients-of-other-gates", GRU, "kInfo.gradient_of_recurrent(gate)", "gate"),
    Mutant("last-product-missed", LSTM),
    Mutant("back-reset-does-not-stop-the-product", LSTM, "zero ? 0.f : ", ""),
    Mutant("rows-yet-to-begin", LSTM),
    # a step
    Mutant("back-reset-does-not-stop-dh-and-dc", LSTM, "begins", "false"),
    Mutant("back-reset-does-not-reach-h", GRU, "begins", "k != kH && begins"),
    Mutant("back-reset-does-not-reach-c", LSTM, "begins", "k == kH && begins"),
    Mutant("dc-of-the-step-before", LSTM, "dafter", "dbefore"),
    Mutant("rows-begin-a-step-late", LSTM, "b < before.active", "b <= before.active"),
    Mutant("shares-of-vectors-in-one-place", PEEPHOLE, "mine.first", "0"),
    Mutant("vectors-count-the-last-row-alone", PEEPHOLE, "+=", "="),
    Mutant("driver-shares-not-cleared", PEEPHOLE, "kInfo.vectors > 0", "false"),
    Mutant("c0-in-another-order", LSTM, "steps.batch(b)", "place.first_row + b"),
    Mutant("single-steps-rows-begin-a-step-late", LSTM, "<= b", "< b"),
    Mutant("single-steps-reset-does-not-reach-the-product", LSTM, "resets ? Acc<S>{} : ", ""),
    Mutant("single-steps-rows-yet-to-begin-not-reset", LSTM, "(B * H)", "(n * H)"),
    Mutant("zoneout-the-wrong-way-round", OPTIONS, "before : fresh", "fresh : before"),
    Mutant("h-without-its-mask", OPTIONS),
    Mutant("dh-without-its-mask", OPTIONS),
    Mutant("nothing-carried-past-the-product", OPTIONS),
    Mutant("one-direction-for-both", LSTM, "d == 0 ? host.T - 1 - step : step", "host.T - 1 - step"),
    Mutant("alone-one-direction-for-both", ALONE, "p.reverse ? step : ", ""),
    Mutant("sums-of-a-row-without-barrier", ROWS),
    Mutant("direct-gradient-of-a-row-passes-a-reset", DIRECT, "zero ? A{} : s.dbefore[k]", "s.dbefore[k]"),
    Mutant("rows-of-no-step-not-cleared", LSTM),
    Mutant("driver-exchange-not-cleared", LSTM),
    Mutant("forward-grid-too-large-taken-for-done", TOO_LARGE, "done =", "done = true |"),
    Mutant("backward-grid-too-large-taken-for-done", TOO_LARGE, "done =", "done = true |"),
    # the linear scan
    Mutant("chunk-carries-nan-past-a-reset", LINEAR, "reset ? sum : ", ""),
    Mutant("chunk-steps-beyond-its-end", LINEAR, "if (k + i < end) ", ""),
    Mutant("chunk-without-factor", LINEAR),
    Mutant("chunk-misses-the-one-before", LINEAR, "c < thread.chunk", "c + 1 < thread.chunk"),
    Mutant("chunk-reversed-from-T", LINEAR, "length", "s.sequence.T"),
    Mutant("chunk-padding-over-the-row", LINEAR, "begin > length ? begin : length", "begin"),
    Mutant("chunk-shifted-without-reset", LINEAR, "reset ? 0 : ", ""),
    Mutant("last-state-of-the-first-chunk", LINEAR, "problem.chunks - 1", "0"),
]  # fmt: skip
MUTANTS = SAMPLE + KERNELS


MARKER = re.compile(r"// mutant: (.+)$")


def marked_lines() -> dict[str, tuple[Path, int]]:
    """The file under csrc, and the line counted from 0, of each mutant that the sources name."""
    places: dict[str, tuple[Path, int]] = {}
    for path in sorted(path for path in CSRC.rglob("*") if path.is_file()):
        for number, line in enumerate(path.read_text().splitlines()):
            if marker := MARKER.search(line):
                place = path.relative_to(CSRC), number + line.lstrip().startswith("//")
                for name in marker[1].split(", "):
                    if name in places:
                        raise ValueError(f"{name} is marked twice: {places[name]} and {place}")
                    places[name] = place
    if unlike := places.keys() ^ {m.name for m in MUTANTS}:
        raise ValueError(f"only in the sources or only in the list: {', '.join(sorted(unlike))}")
    return places


def changed(mutant: Mutant, line: str) -> str:
    if not mutant.text:
        return ""
    code, comment, marker = line.partition("  // mutant: ")
    if code.count(mutant.text) != 1:
        raise ValueError(f"{mutant.name}: not once {mutant.text!r} in {line!r}")
    return code.replace(mutant.text, mutant.replacement) + comment + marker


def mutated(mutant: Mutant, place: tuple[Path, int], work: Path) -> Path:
    """The module of a copy of the sources; objects that do not contain the change are the original's."""
    tree, out = work / "csrc", work / "build"
    shutil.copytree(CSRC, tree)
    file, number = place
    lines = (tree / file).read_text().split("\n")
    lines[number] = changed(mutant, lines[number])
    (tree / file).write_text("\n".join(lines))
    out.mkdir()
    for rule in BUILD.glob("*.d"):
        if str(CSRC / file) not in rule.read_text().split():
            for original in (rule, rule.with_suffix(".o")):
                (out / original.name).symlink_to(original)
    return build(mutant.tests.sanitizer, tree, out, OPTIMIZE, mutant.tests.cells)


def test(tests: Tests, module: Path) -> str:
    """The first failure of the tests in one line; empty if they pass."""
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
    if done.returncode in (2, 3, 4, 5):  # pytest's own faults: no test ran
        raise RuntimeError(" ".join(command) + "\n" + done.stdout + done.stderr)
    lines = reversed((done.stdout + done.stderr).splitlines())
    return next(
        (l for l in lines if l.startswith(("FAILED ", "SUMMARY: "))), f"exit status {done.returncode}"
    )


def judge(mutant: Mutant, place: tuple[Path, int]) -> tuple[str, float]:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        complaint = test(mutant.tests, mutated(mutant, place, Path(work)))
        return complaint.replace(f"{work}/", ""), time.monotonic() - start


def main(*words: str) -> int:
    mutants = [m for m in MUTANTS if all(word in m.name for word in words)]
    marked = marked_lines()
    places = [marked[m.name] for m in mutants]
    for mutant, (file, number) in zip(mutants, places, strict=True):
        changed(mutant, (CSRC / file).read_text().split("\n")[number])  # before anything is compiled
    for tests in dict.fromkeys(m.tests for m in mutants):
        if complaint := test(tests, build(tests.sanitizer, optimize=OPTIMIZE, cells=tests.cells)):
            print(f"the kernels do not pass {tests}: {complaint}")
            return 1
    survivors = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, (complaint, seconds) in zip(mutants, pool.map(judge, mutants, places), strict=True):
            survivors += not complaint
            print(
                f"{mutant.name:45} {mutant.tests.sanitizer:8} {seconds:4.0f} s  {complaint or 'SURVIVES'}",
                flush=True,
            )
    print(f"{len(mutants)} mutants, {survivors} survive")
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
