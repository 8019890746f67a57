"""The CUDA kernels on the CPU: builds the libraries of csrc/testing that run them, with or without a
sanitizer, and runs tests with these.

    python tests/cuda_on_host.py {plain,address,thread} PYTEST-ARGUMENTS
"""

import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda_on_host"
# In the environment: with which sanitizer, and LIBRARY=path, a library that is there and not to be built.
SANITIZER = "FASTRNN_CUDA_SANITIZER"

CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
SANITIZERS = {
    "plain": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
# Never with a sanitizer: what is done behind the kernels' back is not for it to see.
RUNTIME = {"testing/fiber.cpp": "-O2", "testing/cuda_on_host.cpp": "-O2", "testing/cuda_launch.cpp": "-O2"}
CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
# fastrnn_cuda_on_host: a Python module. cuda_operators: torch.ops.fastrnn_cuda_on_host.
LIBRARIES = {
    "fastrnn_cuda_on_host": (RUNTIME | {"testing/cuda_module.cpp": "-O0"}, ["testing/primitives.cpp"]),
    "cuda_operators": (RUNTIME, [f"testing/cuda_{cell}.cpp" for cell in CELLS]),
    "cuda_lstm": (RUNTIME, ["testing/cuda_lstm.cpp"]),  # of these, for the mutants
}

SCHEDULES = [
    ("fifo", 0),
    ("lifo", 0),
    *(("random", seed) for seed in range(3)),
    *(("starve", seed) for seed in range(3)),
]


def run(command):
    """Without the sanitizer that this Python may run under."""
    environ = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environ)
    if done.returncode:
        raise RuntimeError(" ".join(map(str, command)) + "\n" + done.stderr)


def foreign() -> tuple[list[str], list[str]]:
    """Flags to compile and to link with Python's, pybind11's and torch's C++."""
    import pybind11
    from torch.utils import cpp_extension

    folders = [sysconfig.get_paths()["include"], pybind11.get_include(), *cpp_extension.include_paths()]
    compiling = [f"-isystem{folder}" for folder in folders]
    linking = [*(f"-L{folder}" for folder in cpp_extension.library_paths()), "-ltorch_cpu", "-ltorch"]
    return [*compiling, "-DTORCH_TARGET_VERSION=0x020a000000000000"], linking


def up_to_date(target: Path) -> bool:
    """Whether the object is newer than everything that it was compiled from."""
    rule = target.with_suffix(".d")
    if not (target.exists() and rule.exists()):
        return False
    sources = [Path(s) for s in rule.read_text().replace("\\\n", " ").split(":", 1)[1].split()]
    return all(s.exists() and s.stat().st_mtime < target.stat().st_mtime for s in sources)


def build(
    library: str, sanitizer: str = "plain", csrc: Path = CSRC, out: Path = BUILD, optimize: str = ""
) -> Path:
    """Compiles what has changed, and returns the library."""
    optimize = optimize or ("-O2" if sanitizer == "plain" else "-O1")  # twice as fast to compile
    out.mkdir(parents=True, exist_ok=True)
    compiling, linking = foreign()

    def compiled(source: str, flags: list[str], suffix: str) -> Path:
        target = out / f"{Path(source).stem}{suffix}.o"
        if not up_to_date(target):
            run([CXX, *FLAGS, *flags, f"-I{csrc}", *compiling, "-MMD", "-c", csrc / source, "-o", target])
        return target

    runtime, kernels = LIBRARIES[library]
    variant = f"-{sanitizer}{optimize}"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [pool.submit(compiled, s, [o], "") for s, o in runtime.items()]
        objects += [pool.submit(compiled, s, [optimize, *SANITIZERS[sanitizer]], variant) for s in kernels]
    objects = [o.result() for o in objects]
    target = out / f"{library}{variant}.so"
    if not target.exists() or any(o.stat().st_mtime > target.stat().st_mtime for o in objects):
        run([CXX, "-shared", *objects, *SANITIZERS[sanitizer], *linking, "-o", target])
    return target


def find(library: str) -> Path:
    """What the environment names, or what it asks to build."""
    return Path(os.environ.get(library) or build(library, os.environ.get(SANITIZER, "plain")))


def load(path: Path):
    spec = importlib.util.spec_from_file_location("fastrnn_cuda_on_host", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment(sanitizer: str) -> dict[str, str]:
    """For a Python that is to load them: the sanitizer's runtime must be there before its allocator."""
    names = {"plain": [], "address": ["asan", "ubsan", "stdc++"], "thread": ["tsan", "stdc++"]}[sanitizer]
    runtimes = [
        subprocess.check_output([CXX, f"-print-file-name=lib{n}.so"], text=True).strip() for n in names
    ]
    return os.environ | {
        SANITIZER: sanitizer,
        "LD_PRELOAD": " ".join(runtimes),
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=99",  # Python leaves much behind
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1:exitcode=98",
        "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
    }


def test_command(*arguments: str) -> list[str]:
    """What a sanitizer has to say goes past pytest, or it would be lost where it ends the program."""
    return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--capture=sys", *arguments]


def main(sanitizer: str, *arguments: str) -> int:
    return subprocess.run(test_command(*arguments), env=environment(sanitizer), check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
