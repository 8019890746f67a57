"""The CUDA kernels on the CPU: builds the module fastrnn_cuda_on_host of csrc/testing, with or without a
sanitizer, and runs tests with it.

    python tests/cuda_on_host.py {plain,address,thread} PYTEST-ARGUMENTS
"""

import fcntl
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda_on_host"
MODULE = "FASTRNN_CUDA_ON_HOST"  # in the environment: the module to test, if it is not to be built

CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
SANITIZERS = {
    "plain": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
# The machine that runs the kernels: compiled without sanitizers, because only the kernels are checked.
RUNTIME = {
    "testing/fiber.cpp": "-O2",
    "testing/cuda_on_host.cpp": "-O2",
    "testing/cuda_launch.cpp": "-O2",
    "testing/cuda_module.cpp": "-O0",
}
CELLS = tuple(sorted(p.stem for p in (CSRC / "cuda").glob("*.cu") if p.stem != "module"))
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"

SCHEDULES = [
    ("fifo", 0),
    ("lifo", 0),
    *(("random", seed) for seed in range(3)),
    *(("starve", seed) for seed in range(3)),
]


def run(command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(" ".join(map(str, command)) + "\n" + done.stderr)


@contextmanager
def building(folder: Path):
    """One process at a time builds in a folder, and the others wait: the suite runs in several."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def up_to_date(target: Path) -> bool:
    """Whether the object is newer than everything that it was compiled from."""
    rule = target.with_suffix(".d")
    if not (target.exists() and rule.exists()):
        return False
    sources = [Path(s) for s in rule.read_text().replace("\\\n", " ").split(":", 1)[1].split()]
    return all(s.exists() and s.stat().st_mtime < target.stat().st_mtime for s in sources)


def build(
    sanitizer: str = "plain",
    csrc: Path = CSRC,
    out: Path = BUILD,
    optimize: str = "",
    cells: Sequence[str] = CELLS,
) -> Path:
    """Compiles what has changed, and returns the module."""
    optimize = optimize or ("-O2" if sanitizer == "plain" else "-O0")  # compiled in a third of the time
    import pybind11
    from torch.utils.cpp_extension import include_paths, library_paths

    system = [pybind11.get_include(), sysconfig.get_paths()["include"], *include_paths()]
    includes = [STABLE_ABI, f"-I{csrc}", *(f"-isystem{path}" for path in system)]
    torch = [f"-L{path}" for path in library_paths()] + ["-ltorch_cpu", "-lc10"]
    kernels = [
        "testing/primitives.cpp",
        "testing/cuda_scans.cpp",
        *(f"testing/cuda_{cell}.cpp" for cell in cells),
    ]

    def compiled(source: str, flags: list[str], suffix: str) -> Path:
        target = out / f"{Path(source).stem}{suffix}.o"
        if not up_to_date(target):
            run([CXX, *FLAGS, *flags, *includes, "-MMD", "-c", csrc / source, "-o", target])
        return target

    module = out / f"fastrnn_cuda_on_host-{'-'.join([sanitizer + optimize, *cells])}.so"
    with building(out):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [pool.submit(compiled, s, [o], "") for s, o in RUNTIME.items()]
            flags = [optimize, *SANITIZERS[sanitizer]]
            objects += [pool.submit(compiled, s, flags, f"-{sanitizer}{optimize}") for s in kernels]
        objects = [o.result() for o in objects]
        if not module.exists() or any(o.stat().st_mtime > module.stat().st_mtime for o in objects):
            run([CXX, "-shared", *objects, *SANITIZERS[sanitizer], *torch, "-o", module])
    return module


def load(path: Path):
    import torch  # noqa: F401  (the module is linked with its libraries)

    spec = importlib.util.spec_from_file_location("fastrnn_cuda_on_host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment(sanitizer: str, module: Path) -> dict[str, str]:
    """For a Python that loads the module: the sanitizer's runtime must come before Python's allocator."""
    names = {"plain": [], "address": ["asan", "ubsan", "stdc++"], "thread": ["tsan", "stdc++"]}[sanitizer]
    find = lambda name: subprocess.check_output([CXX, f"-print-file-name=lib{name}.so"], text=True).strip()  # noqa: E731
    return os.environ | {
        MODULE: str(module),
        "LD_PRELOAD": " ".join(map(find, names)),
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",  # no threads of torch's own under the sanitizer
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=99",  # Python frees little at its end
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1:exitcode=98",
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
    }


def test_command(*arguments: str) -> list[str]:
    """pytest captures sys.stderr alone: a sanitizer writes past it and is heard when it ends the process."""
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--capture=sys", *arguments]


def main(sanitizer: str, *arguments: str) -> int:
    environ = environment(sanitizer, build(sanitizer))
    return subprocess.run(test_command(*arguments), env=environ, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
