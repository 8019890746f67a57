"""Fixtures of the core tests: the internals of the extension as a module, a fixed random state, threads."""

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import cuda_on_host
import pytest
import torch

ROOT = Path(__file__).parents[1]
# Ignored where the suite was started in a shell's background, and then in every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
BUILD = ROOT / "build" / "testing"


def build_internals():
    """The module fastrnn_testing of csrc/testing, built if anything that it includes has changed."""
    with cuda_on_host.building(BUILD):
        subprocess.run(
            [
                sys.executable, ROOT / "csrc/testing/setup.py", "-q", "build_clib", "--build-clib", BUILD,
                "--build-temp", BUILD, "build_ext", "--build-lib", BUILD, "--build-temp", BUILD,
            ],
            check=True,
        )  # fmt: skip
    newest = max(BUILD.glob("fastrnn_testing.*.so"), key=lambda path: path.stat().st_mtime)
    spec = importlib.util.spec_from_file_location("fastrnn_testing", newest)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def internals():
    return build_internals()


@pytest.fixture(scope="session")
def on_host():
    """The CUDA kernels on the CPU."""
    return cuda_on_host.load(os.environ.get(cuda_on_host.MODULE) or cuda_on_host.build())


@pytest.fixture(autouse=True)
def fixed_random_state():
    torch.manual_seed(0)


@pytest.fixture(params=[1, 2, 4])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def without_16_bit_kernels(monkeypatch):
    """16 bits on the CPU as a dtype without kernels, which other devices and dtypes are."""
    monkeypatch.setattr("fastrnn.functional.SUMMED_IN_FLOAT32", ())
