"""Builds fastrnn_testing, the internals as a Python module, for the tests alone:

python csrc/testing/setup.py build_clib build_ext --build-lib build/testing --build-temp build/testing
"""

import os
import platform
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

os.chdir(Path(__file__).parents[2])
HEADERS = sorted(str(p) for s in ("*.h", "*.inc") for p in Path("csrc").rglob(s))
FLAGS = {"baseline": []}  # as in setup.py: the functions measured must be those that are shipped
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS |= {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"],
    }
COMMON = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]


def math(name: str, flags: list[str]) -> tuple[str, dict]:
    return f"fastrnn_testing_{name}", {
        "sources": [f"csrc/testing/math_{name}.cpp"],
        "include_dirs": ["csrc"],
        "cflags": ["-O3", *COMMON, *flags],
        "obj_deps": {"": HEADERS},
    }


setup(
    name="fastrnn_testing",
    packages=[],
    py_modules=[],
    libraries=[math(*item) for item in FLAGS.items()],
    ext_modules=[
        Pybind11Extension(
            "fastrnn_testing",
            ["csrc/testing/module.cpp", "csrc/testing/team.cpp", "csrc/cpu/team.cpp"],
            include_dirs=["csrc"],
            depends=HEADERS,
            extra_compile_args=["-O2", *COMMON],
        )
    ],
)
