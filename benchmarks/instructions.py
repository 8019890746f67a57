"""Counts instructions: a figure that no neighbour disturbs. ``python benchmarks/instructions.py``

Reference calls (csrc/testing/drive.cpp: forward, backward and products of one layer, one thread) run under
callgrind for AVX2 and the baseline. valgrind knows no AVX-512: for it, and beside it for the others, the hot
loop of the full tile is read from the disassembly, as multiply-adds a instruction. Needs g++, binutils and
valgrind.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CSRC = Path(__file__).parents[1] / "csrc"
# As in setup.py.
FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"],
}
COMMON = ["-std=c++20", "-O3", "-fvisibility=hidden", "-I."]
# drive's arguments: cell, type, T, B, I, H, P, threads
CALLS = ("lstm f32 20 32 128 128 0 1", "gru f32 20 1 256 256 0 1", "lstm f32 1 32 128 128 0 1")
LANES = {"baseline": 4, "avx2": 8, "avx512": 16}
FULL_TILE = {isa: f"tile<{rows}, 2, false, true, float, float>"
             for isa, rows in (("baseline", 6), ("avx2", 6), ("avx512", 12))}  # fmt: skip
FUSED = re.compile(r"vfn?madd\S*ps|mulps")


def run(*command: object, **options) -> str:
    return subprocess.run(
        [str(c) for c in command], check=True, text=True, capture_output=True, **options
    ).stdout


def compile_all(folder: Path) -> Path:
    """The driver with the kernels of every instruction set."""
    objects = []
    for name in ("testing/drive", "cpu/instruction_set", "cpu/memory", "cpu/plan", "cpu/team"):
        objects.append(folder / f"{Path(name).name}.o")
        run("g++", *COMMON, "-c", f"{name}.cpp", "-o", objects[-1], cwd=CSRC)
    for isa, flags in FLAGS.items():
        objects.append(folder / f"kernels_{isa}.o")
        run("g++", *COMMON, *flags, "-c", f"cpu/kernels_{isa}.cpp", "-o", objects[-1], cwd=CSRC)
    run("g++", "-pthread", *objects, "-o", folder / "drive")
    return folder / "drive"


def count(drive: Path, isa: str, call: str) -> int:
    command = [
        "valgrind",
        "--tool=callgrind",
        "--toggle-collect=fastrnn_measured",
        "--callgrind-out-file=/dev/null",
    ]
    environment = {"FASTRNN_CPU_ISA": isa, "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [*command, str(drive), *call.split(), "quiet"],
        check=True,
        text=True,
        capture_output=True,
        env=environment,
    )
    return int(re.search(r"Collected : (\d+)", result.stderr)[1])  # type: ignore[index]


def hot_loop(folder: Path, isa: str) -> dict[str, int | float]:
    """Counts of the innermost loop of the full tile that has the most multiply-adds."""
    listing = run("objdump", "-dC", "--no-show-raw-insn", folder / f"kernels_{isa}.o")
    body = next(part for part in listing.split("\n\n") if FULL_TILE[isa] in part.split("\n", 2)[0])
    lines = [re.match(r"\s*([0-9a-f]+):\s+(\S+)\s*(\S*)", line) for line in body.splitlines()]
    code = [(int(m[1], 16), m[2], m[3]) for m in lines if m]
    best: tuple[int, int] = (0, 1)
    for end, (address, name, target) in enumerate(code):
        if not name.startswith("j") or not re.fullmatch("[0-9a-f]+", target) or int(target, 16) >= address:
            continue
        start = next(i for i, (a, _, _) in enumerate(code) if a >= int(target, 16))
        loop = [n for _, n, _ in code[start : end + 1]]
        fused = sum(bool(FUSED.fullmatch(n)) for n in loop)
        inner = not any(n.startswith("j") for n in loop[:-1])
        if inner and fused > best[0]:
            best = (fused, len(loop))
    fused, total = best
    return {"instructions": total, "multiply_adds": fused, "lanes": LANES[isa],
            "multiply_adds_an_instruction": round(fused * LANES[isa] / total, 2)}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    found: dict = {"compiler": run("g++", "--version").splitlines()[0], "calls": {}, "hot_loop": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        drive = compile_all(folder)
        for isa in FLAGS:
            found["hot_loop"][isa] = hot_loop(folder, isa)
            print(f"{isa:9} {FULL_TILE[isa]}: {found['hot_loop'][isa]}", flush=True)
        for call in CALLS:
            found["calls"][call] = {isa: count(drive, isa, call) for isa in ("avx2", "baseline")}
            print(f"{call}: {found['calls'][call]} instructions", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
