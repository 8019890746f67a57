"""Builds fastrnn._C on libtorch's stable ABI: one binary for every torch from 2.10 and Python from 3.10."""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_clib import build_clib

try:
    from setuptools.modified import newer_group
except ModuleNotFoundError:
    sys.exit("fastrnn: building needs setuptools>=77; update it, or build without --no-build-isolation.")

if sys.platform != "linux":
    sys.exit(f"fastrnn: builds on Linux only so far, not on {sys.platform}.")

OLDEST_TORCH = (2, 10)

try:
    import torch
except ModuleNotFoundError:
    sys.exit("fastrnn: building needs torch; install it first, or build without --no-build-isolation.")
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
    sys.exit(f"fastrnn: building needs torch>=2.10, found {torch.__version__}.")

from torch.utils.cpp_extension import (  # noqa: E402
    BuildExtension,
    CppExtension,
    include_paths,
    library_paths,
)

os.chdir(Path(__file__).parent)
HEADERS = sorted(str(p) for s in ("*.h", "*.inc") for p in Path("csrc").rglob(s) if "testing" not in p.parts)
# What the kernels are told, and nothing of torch: a change elsewhere does not compile them again.
KERNEL_HEADERS = [
    h
    for h in HEADERS
    if h.startswith(("csrc/cells", "csrc/cpu", "csrc/common/inline", "csrc/common/problem"))
]
INCLUDE = str(Path("csrc").resolve())  # ninja compiles in a folder of its own
# FASTRNN_SANITIZE=1 is for `make sanitize`.
SANITIZED = os.environ.get("FASTRNN_SANITIZE") == "1"
SANITIZE = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g1"]
EXTRA = SANITIZE if SANITIZED else ["-g0"]
# The kernels' fully unrolled loops take a sanitizing compiler ten minutes at -O3.
KERNEL_LEVEL = "-O1" if SANITIZED else "-O3"
# One folder for every way of building, so that an editable install compiles only what has changed.
TEMPORARY = "build/sanitized" if SANITIZED else "build/objects"
# Error messages carry the source file's name: the project's path to it, not the builder's.
PREFIXES = {f"{Path.cwd()}/": "", f"{Path(torch.__file__).parent}/": "torch/"}
COMMON = [
    "-fvisibility=hidden",
    *(f"-ffile-prefix-map={long}={short}" for long, short in PREFIXES.items()),
    "-Wall",
    *EXTRA,
]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"],
    }


def best_here() -> str:
    """The best instruction set that this processor has."""
    words = set(Path("/proc/cpuinfo").read_text().split())
    return "avx512" if "avx512vl" in words else "avx2" if "avx2" in words else "baseline"


def kernels(name: str, flags: list[str]) -> tuple[str, dict]:
    """The kernels of one instruction set: a static library, because these alone have flags of their own."""
    cflags = ["-std=c++20", KERNEL_LEVEL, "-fPIC", "-fno-exceptions", "-Wextra", *COMMON, *flags]
    if SANITIZED and name != best_here():  # compiled to be linked alone: one set takes minutes
        cflags = ["-O0" if flag == KERNEL_LEVEL else flag for flag in cflags if flag not in SANITIZE]
    return f"fastrnn_{name}", {
        "sources": [f"csrc/cpu/kernels_{name}.cpp"],
        "include_dirs": [INCLUDE],
        "cflags": cflags,
        "obj_deps": {"": [*KERNEL_HEADERS, "setup.py"]},
    }


LIBRARIES = [kernels(*item) for item in INSTRUCTION_SETS.items()]

# FASTRNN_CUDA: 1 builds the CUDA kernels, for which nvcc is enough, without a GPU or a CUDA build of torch;
# 0 leaves them out; auto, the default, builds them where nvcc is and this torch could load them.
CUDA = "fastrnn._C_cuda"
CUDA_SOURCES = sorted(str(p) for folder in ("cuda", "linear") for p in Path("csrc", folder).glob("*.cu"))
CUDA_HEADERS = sorted(
    str(p) for folder in ("cells", "common", "cuda", "linear") for p in Path("csrc", folder).glob("*.*h")
)


def find_nvcc() -> str | None:
    """nvcc, if the CUDA kernels are to be built."""
    wanted = os.environ.get("FASTRNN_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        sys.exit(f"fastrnn: FASTRNN_CUDA must be 0, 1 or auto, got {wanted!r}.")
    if wanted == "0" or (wanted == "auto" and torch.version.cuda is None):
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if nvcc is None and wanted == "1":
        sys.exit(
            "fastrnn: FASTRNN_CUDA=1 needs nvcc; install CUDA's toolkit, or say with CUDA_HOME where it is."
        )
    if nvcc is None:
        print(
            "fastrnn: there is no nvcc, so that the CUDA kernels are left out (CUDA_HOME says where it is)."
        )
    return nvcc


NVCC = find_nvcc()


def architectures() -> list[str]:
    """nvcc's words for TORCH_CUDA_ARCH_LIST, such as "8.0;9.0+PTX"."""
    flags = []
    for name in os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX").replace(";", " ").split():
        number, _, ptx = name.replace(".", "").partition("+")
        codes = [f"sm_{number}"] + [f"compute_{number}"] * (ptx == "PTX")
        flags += [f"-gencode=arch=compute_{number.rstrip('af')},code={code}" for code in codes]
    return flags


def check_tools() -> None:
    """Ends with one sentence where nothing can be built. setuptools and torch use the same CXX, or c++."""
    compiler = shlex.split(os.environ.setdefault("CXX", "c++"))
    if not shutil.which(compiler[0]):
        sys.exit(
            f"fastrnn: building needs a C++20 compiler, and {compiler[0]!r} was not found; "
            "install one (Debian and Ubuntu: apt install g++) or name one with CXX."
        )
    probe = "#include <concepts>\nint main() { return []<std::integral T>(T t) { return t; }(0); }\n"
    options = ["-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    if subprocess.run([*compiler, *options], input=probe, text=True, capture_output=True).returncode:
        sys.exit(f"fastrnn: building needs a C++20 compiler, and {compiler[0]!r} is not: g++ 11 or newer is.")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        sys.exit(
            "fastrnn: building needs Python's headers, and there is no Python.h in "
            f"{sysconfig.get_path('include')} (Debian and Ubuntu: apt install python3-dev)."
        )


class BuildKernels(build_clib):
    """One library per instruction set, side by side: each takes a compiler about 15 s."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = self.build_clib = TEMPORARY

    def run(self) -> None:
        check_tools()
        super().run()

    def build_libraries(self, libraries) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda library: super(BuildKernels, self).build_libraries([library]), libraries))


class Build(BuildExtension):
    """The extension, after the kernels that it links; the CUDA kernels by nvcc."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = TEMPORARY

    def run(self) -> None:
        self.run_command("build_clib")
        super().run()

    def build_extension(self, ext) -> None:
        if ext.name != CUDA:
            return super().build_extension(ext)
        folder = Path(TEMPORARY, "cuda")
        folder.mkdir(parents=True, exist_ok=True)
        flags = [
            "-std=c++20", "-O3", *architectures(), "--ptxas-options=-v",
            f"-Xcompiler={','.join(['-fPIC', *COMMON])}",
            "-DUSE_CUDA", "-DPy_LIMITED_API=0x030a0000", STABLE_ABI, f"-I{INCLUDE}",
            *(f"-isystem={path}" for path in (*include_paths(), sysconfig.get_path("include"))),
        ]  # fmt: skip

        def compiled(source: str) -> str:
            target = folder / f"{Path(source).stem}.o"
            if newer_group([source, *CUDA_HEADERS, "setup.py"], str(target)):
                done = subprocess.run(
                    [NVCC, "-c", source, "-o", target, *flags], capture_output=True, text=True, check=False
                )
                if done.returncode:
                    target.unlink(missing_ok=True)
                    sys.exit(f"fastrnn: {NVCC} cannot compile {source}:\n{done.stderr}")
                target.with_suffix(".ptxas").write_text(done.stderr)  # registers and spills of each kernel
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, CUDA_SOURCES))
        libraries = Path(NVCC).resolve().parents[1] / "lib64"
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        # torch's CUDA library is looked up when the module is loaded: csrc/cuda/module.cu.
        options = [
            *(f"-L{path}" for path in library_paths()),
            "-lc10",
            "-ltorch_cpu",
            f"-L{libraries}",
            "-lcudart_static",
        ]
        compiler = shlex.split(os.environ["CXX"])
        subprocess.run([*compiler, "-shared", *objects, *options, "-ldl", "-lrt", "-o", target], check=True)


# torch's ninja files quote a CXX of several words, such as "ccache g++", as one.
NINJA = len(shlex.split(os.environ.get("CXX", "c++"))) == 1

setup(
    libraries=LIBRARIES,
    ext_modules=[
        CppExtension(
            "fastrnn._C",
            [
                "csrc/ops.cpp",
                "csrc/cpu/bfloat16.cpp",
                "csrc/cpu/instruction_set.cpp",
                "csrc/cpu/int8.cpp",
                "csrc/cpu/memory.cpp",
                "csrc/cpu/plan.cpp",
                "csrc/cpu/scan.cpp",
                "csrc/cpu/team.cpp",
                "csrc/direct/calls.cpp",
                "csrc/linear/cpu.cpp",
            ],
            include_dirs=[INCLUDE],
            depends=[
                *HEADERS,
                *(source for _, library in LIBRARIES for source in library["sources"]),
                "setup.py",
            ],
            py_limited_api=True,
            extra_compile_args={
                "cxx": [
                    "-std=c++20",
                    "-O3",  # -O2 leaves the tiles of bfloat16.cpp and int8.cpp rolled: 2.3 times the time
                    *COMMON,
                    STABLE_ABI,
                ]
            },
            extra_link_args=EXTRA,
        ),
        *([Extension(CUDA, [], depends=[*CUDA_SOURCES, *CUDA_HEADERS], py_limited_api=True)] if NVCC else []),
    ],
    cmdclass={"build_clib": BuildKernels, "build_ext": Build.with_options(use_ninja=NINJA)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
