"""What runs on the device of strict_device.py, each file in a process of its own: beside another device
torch makes checkpoints and forks differently."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["strict_no_waiting", "strict_on_device"])
def test_on_a_strict_device(name: str) -> None:
    file = Path(__file__).with_name(f"{name}.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", str(file)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
