"""The training command line on a device as strict as CUDA: what benchmarks/gpu_report.sh runs on a GPU."""

import sys
from pathlib import Path

import pytest
from strict_device import STRICT, strict_device

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_training


def test_every_command_runs_to_its_report_on_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with strict_device(monkeypatch):
        status = gpu_training.main([str(tmp_path), "--steps=6", "--small", *STRICT], ddp=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("== train")]
    assert [line for line in lines if ": passed (" not in line] == []
    assert len(lines) == 8
    assert status == 0
