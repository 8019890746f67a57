"""The benchmark on CUDA devices, the model of their speed and the script of the report, without a device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import gpu_model  # noqa: E402
from gpu_model import Scan, count, predict  # noqa: E402

from fastrnn.bench.cases import Case  # noqa: E402


@pytest.fixture(autouse=True)
def precision_is_restored():
    """The benchmark sets torch's precisions for its whole process."""
    flags = torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = [flag.fp32_precision for flag in flags]
    yield
    for flag, precision in zip(flags, before, strict=True):
        flag.fp32_precision = precision


# ---- The benchmark -----------------------------------------------------------------------------------


def test_a_quick_run_on_the_cpu_writes_json_and_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", str(tmp_path), "--device", "cpu", "--quick", "--budget", "60"]
    )
    monkeypatch.setattr(gpu, "paired", lambda *a: gpu_paired(*a[:2], 0.0))
    assert gpu.main() == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {r["case"] for r in found["records"]} == {"lstm-5x3x4x8-f32", "gru-5x3x4x8-f32"}
    assert all(r["us_step"] > 0 and "kernels" in r["path"] for r in found["records"])
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    assert "GRU f32 training" in capsys.readouterr().out


gpu_paired = gpu.paired


def test_a_wrong_result_is_a_failure(tmp_path, monkeypatch):
    forward = gpu.fastrnn.GRU.forward

    def wrong(self, *args):
        y, h = forward(self, *args)
        return y * 1.01, h

    monkeypatch.setattr(gpu.fastrnn.GRU, "forward", wrong)
    arguments = [str(tmp_path), "--device", "cpu", "--quick", "--cases", "gru-*"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    assert gpu.main() == 1
    (first, *_) = json.loads((tmp_path / "gpu.json").read_text())["environment"]["failed"]
    assert "gru-5x3x4x8-f32 train: result 0 is off by 1.0e-02" in first


def test_what_the_budget_does_not_reach_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path), "--device", "cpu", "--quick", "--budget", "0"])
    assert gpu.main() == 0
    assert len(json.loads((tmp_path / "gpu.json").read_text())["environment"]["left out"]) == 4


def test_every_case_has_a_name_of_its_own_and_every_type_of_numbers():
    chosen = gpu.jobs(False, ["*"])
    names = [(f"{case.name}-{numbers}", mode) for case, numbers, mode in chosen]
    assert len(set(names)) == len(names)
    assert {numbers for _, numbers, _ in chosen} == set(gpu.DTYPES)
    assert all(case.dtype is gpu.DTYPES[numbers] and case.dropout == 0 for case, numbers, _ in chosen)


@pytest.mark.parametrize(
    ("case", "numbers", "regime"),
    [
        (Case("LSTM", 1024, 16, 768, 768), "f16", "persist-static"),
        (Case("LSTM", 1024, 16, 768, 768), "bf16", "GEMM per step"),
        (Case("LSTM", 1024, 12, 768, 768), "f16", "GEMM per step"),
        (Case("GRU", 1024, 16, 768, 768), "f16", "GEMM per step"),
        (Case("LSTM", 1024, 16, 768, 768, layers=2), "f16", "GEMM per step"),
        (Case("GRU", 100, 16, 9, 192), "f32", "persistent, small H"),
        (Case("GRU", 100, 16, 9, 193), "f32", "GEMM per step"),
        (Case("RNN", 100, 16, 9, 384), "f32", "persistent, small H"),
        (Case("GRU", 100, 16, 9, 64, fill=0.5), "f32", "GEMM per step"),
    ],
)
def test_the_regimes_of_cudnn_are_those_of_torchs_rule(case, numbers, regime):
    assert gpu.cudnn_regime(case, numbers, forward=True) == regime


# ---- The model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", [True, False])
@pytest.mark.parametrize("numbers", ["bf16", "tf32", "f32"])
@pytest.mark.parametrize(
    ("cell", "B", "H"), [("LSTM", 64, 512), ("GRU", 32, 768), ("LSTM", 16, 512), ("RNN", 8, 512)]
)
def test_the_instructions_make_up_the_product_exactly_where_sizes_fit(cell, B, H, numbers, forward):
    scan = Scan(cell, numbers, 100, B, H, forward)
    g = scan.geometry()
    multiplications = 16 * 8 * (16 if numbers != "tf32" else 8)
    made = count(scan, g).mma_block * multiplications * g.blocks * g.replicas
    wanted = gpu_model.GATES[cell] * H * H * B
    # What is on top is padding: rows of tiles that no unit has, rows of the batch beyond the last.
    assert wanted <= made <= 1.1 * wanted


def test_a_step_takes_longer_with_more_rows_and_units_and_never_less_than_its_meeting():
    times = [
        gpu_model.step_microseconds(Scan("LSTM", "bf16", 100, B, H, True))[0]
        for B, H in ((8, 256), (8, 1024), (64, 1024))
    ]
    assert 1e6 * gpu_model.MEETING < times[0] < times[1] < times[2]


def test_the_parts_of_a_step_add_up():
    scan = Scan("LSTM", "bf16", 100, 64, 1024, False)
    p = predict(scan, scan.geometry())
    assert p.total == pytest.approx(p.meeting + p.fetch + p.product + p.cell)
    assert getattr(p, p.limit) == max(p.meeting, p.fetch, p.product, p.cell, p.far)


def test_the_table_has_every_anchor(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_model.py", "--markdown"])
    gpu_model.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(gpu_model.ANCHORS)
    assert len({line.count("|") for line in lines}) == 1
    assert {len(row) for row in gpu_model.rows()} == {len(gpu_model.COLUMNS)}


# ---- The report --------------------------------------------------------------------------------------

STUB = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
[[ "$*" != *"$FAILING"* ]]
"""


def report(tmp_path, *stages: str, failing: str = "nothing") -> tuple[int, str, str]:
    """Status, summary and calls of the script, with a stub for Python that fails where it is told to."""
    stub, calls = tmp_path / "python", tmp_path / "calls"
    stub.write_text(STUB)
    stub.chmod(0o755)
    for name in ("nvidia-smi", "nvcc", "compute-sanitizer"):
        (tmp_path / name).symlink_to(stub)
    environment = os.environ | {
        "PYTHON": str(stub), "CALLS": str(calls), "FAILING": failing, "REPORT_SECONDS": "60",
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_HOME": str(tmp_path),
    }  # fmt: skip
    command = [str(BENCHMARKS / "gpu_report.sh"), str(tmp_path / "out"), *stages]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, (tmp_path / "out" / "summary.txt").read_text(), calls.read_text()


def test_a_report_in_which_all_passes_ends_with_zero(tmp_path):
    status, summary, calls = report(tmp_path)
    assert status == 0, summary
    for part in (
        "setup.py build_ext",
        "tests/test_cuda.py",
        "tests/test_cuda_kernels.py",
        "benchmarks/gpu_training.py",
        "benchmarks/gpu.py",
    ):
        assert part in calls
    assert calls.count("cuda_small.py --few") == 4
    assert "passed  racecheck" in summary


@pytest.mark.parametrize(
    "failing", ["build_ext", "test_cuda.py", "test_cuda_kernels.py", "gpu_training.py", "racecheck", "gpu.py"]
)
def test_a_stage_that_fails_is_told_and_the_later_ones_run(tmp_path, failing):
    status, summary, calls = report(tmp_path, failing=failing)
    assert status == 1
    assert summary.count("FAILED  ") == 1
    assert "benchmarks/gpu.py" in calls


def test_stages_are_chosen_and_unknown_ones_refused(tmp_path):
    status, summary, calls = report(tmp_path, "bench", "benhc")
    assert status == 1
    assert "build_ext" not in calls
    assert "a stage called benhc" in summary
