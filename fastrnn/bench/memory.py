"""Peak memory of one training step, each library in a process of its own.

The figure is the growth of the resident set's high-water mark (VmHWM, reset through
/proc/self/clear_refs) during the step, over the resident set with parameters and input in place:
it covers every allocator, oneDNN's and the kernels' own buffers included. A step on a small shape
comes first, so that code pages and thread stacks are loaded. Linux only; about 1 MB of noise.
"""

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from fastrnn.bench.cases import CASES, TRAIN, Case
from fastrnn.bench.workload import NO_PROJECTION, Workload

# glibc gives freed blocks back at once: without this, heap layout made 53 to 125 MB of one step.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def peak_megabytes(case: Case, library: str, threads: int) -> float:
    """Peak of a training step of ``case`` on ``library`` ("torch.nn" or "fastrnn")."""
    command = [sys.executable, "-W", f"ignore:{NO_PROJECTION}", "-m", "fastrnn.bench.memory"]
    command += [case.name, library, str(threads)]
    environment = {**os.environ, **RETURN_MEMORY}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout)


def _measure(case: Case, library: str, threads: int) -> float:
    torch.set_num_threads(threads)
    module = importlib.import_module(library)
    small = replace(case, T=min(case.T, 4), B=min(case.B, 4), I=16, H=16, proj_size=0)
    Workload(small, module, TRAIN)()
    step = Workload(case, module, TRAIN)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kilobytes("VmHWM")
    results = step()
    after = _status_kilobytes("VmHWM")
    del results
    return (after - before) / 1000


def _status_kilobytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    name, library, threads = sys.argv[1:]
    case = next(case for case in CASES if case.name == name)
    print(_measure(case, library, int(threads)))
