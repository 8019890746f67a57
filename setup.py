"""Builds fastrnn._C on libtorch's stable ABI: one binary for every torch from 2.10 and Python from 3.10."""

import os
import platform
import sys
from pathlib import Path

from setuptools import setup

OLDEST_TORCH = (2, 10)

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError:
    sys.exit(
        "fastrnn: building needs torch; install it first, or build without --no-build-isolation."
    )
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
    sys.exit(f"fastrnn: building needs torch>=2.10, found {torch.__version__}.")
if sys.platform != "linux":
    sys.exit(f"fastrnn: builds on Linux only so far, not on {sys.platform}.")

os.chdir(Path(__file__).parent)
HEADERS = sorted(str(p) for s in ("*.h", "*.inc") for p in Path("csrc").rglob(s))
INCLUDE = str(Path("csrc").resolve())  # ninja compiles in a folder of its own
SANITIZE = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]
# FASTRNN_SANITIZE=1 is for `make sanitize`.
EXTRA = SANITIZE if os.environ.get("FASTRNN_SANITIZE") == "1" else []
# Error messages carry the source file's name: the project's path to it, not the builder's.
COMMON = ["-fvisibility=hidden", f"-ffile-prefix-map={Path.cwd()}/=", "-Wall", *EXTRA]
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"],
    }


def kernels(name: str, flags: list[str]) -> tuple[str, dict]:
    """The kernels of one instruction set: a static library, because these alone have flags of their own."""
    cflags = ["-std=c++20", "-O3", "-fPIC", "-fno-exceptions", "-Wextra", *COMMON, *flags]
    return f"fastrnn_{name}", {
        "sources": [f"csrc/cpu/kernels_{name}.cpp"],
        "include_dirs": [INCLUDE],
        "cflags": cflags,
        "obj_deps": {"": HEADERS},
    }


setup(
    libraries=[kernels(*item) for item in INSTRUCTION_SETS.items()],
    ext_modules=[
        CppExtension(
            "fastrnn._C",
            [
                "csrc/ops.cpp",
                "csrc/cpu/instruction_set.cpp",
                "csrc/cpu/plan.cpp",
                "csrc/cpu/scan.cpp",
                "csrc/cpu/team.cpp",
            ],
            include_dirs=[INCLUDE],
            depends=HEADERS,
            py_limited_api=True,
            extra_compile_args={
                "cxx": [
                    "-std=c++20",
                    "-O2",
                    *COMMON,
                    "-DTORCH_TARGET_VERSION=0x020a000000000000",
                ]
            },
            extra_link_args=EXTRA,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
