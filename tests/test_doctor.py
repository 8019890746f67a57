"""python -m fastrnn doctor: it finds what is broken, whatever is broken, and says what to do."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastrnn import _cuda, doctor

PACKAGE = Path(doctor.__file__).parent


def diagnose(capsys) -> tuple[int, dict[str, dict]]:
    status = doctor.main(["--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["works"] == (status == 0)
    return status, {check["name"]: check for check in report["checks"]}


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def broken_package(tmp_path):
    """A copy of the package whose compiled part is a text file."""
    copy = tmp_path / "fastrnn"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "training", "bench", "__pycache__"))
    (copy / "_C.abi3.so").write_text("not a library")
    return copy


def test_a_sound_installation_passes(capsys):
    status, checks = diagnose(capsys)
    assert status == 0
    assert {"torch", "build", "cuda", "threads", "kernels", "self-test"} <= checks.keys()
    assert checks["kernels"]["found"].split(",")[0] == torch.ops.fastrnn.cpu_isa()


def test_the_page_for_people_names_every_check(capsys):
    assert doctor.main([]) == 0
    page = capsys.readouterr().out
    assert page.endswith("\nfastrnn works.\n")
    assert "self-test" in page


def test_errors_beyond_the_bounds_are_broken(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "BOUNDS", doctor.BOUNDS | {"float32": 0.0})
    status, checks = diagnose(capsys)
    assert status == 1
    assert "LSTM, float32" in checks["self-test"]["found"]
    assert "LSTM, float64" not in checks["self-test"]["found"]


def test_a_module_whose_results_are_nan_is_broken(capsys, monkeypatch):
    answer = json.dumps({"isa": "avx2", "products": "", "errors": {"GRU, float64": float("nan")}})
    done = subprocess.CompletedProcess([], 0, stdout=answer, stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    status, checks = diagnose(capsys)
    assert status == 1
    assert "GRU, float64" in checks["self-test"]["found"]


def test_a_failing_self_test_is_a_finding_with_advice(capsys, monkeypatch):
    monkeypatch.setenv("FASTRNN_CPU_ISA", "mmx")
    status, checks = diagnose(capsys)
    assert status == 1
    assert "mmx" in checks["self-test"]["found"]
    assert "unset FASTRNN_CPU_ISA" in checks["self-test"]["advice"]


def test_the_override_of_the_instruction_set_is_noted(capsys, monkeypatch):
    monkeypatch.setenv("FASTRNN_CPU_ISA", "baseline")
    status, checks = diagnose(capsys)
    assert status == 0
    assert checks["kernels"]["status"] == "note"
    assert checks["kernels"]["found"].startswith("baseline")


def test_a_library_that_does_not_load_is_explained(broken_package):
    result = run("-m", "fastrnn", "doctor", "--json", cwd=broken_package.parent)
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert result.returncode == 1
    assert checks["build"]["status"] == "broken"
    assert checks["build"]["advice"]
    assert checks["self-test"]["status"] == "skipped"


def test_a_missing_library_is_explained(broken_package):
    (broken_package / "_C.abi3.so").unlink()
    result = run("-m", "fastrnn", "doctor", cwd=broken_package.parent)
    assert result.returncode == 1
    assert "there is no compiled part" in result.stdout


def test_a_build_older_than_the_sources_is_explained(broken_package):
    shutil.copy(PACKAGE / "_C.abi3.so", broken_package)
    with (broken_package / "_operators.py").open("a") as sources:
        sources.write('raise RuntimeError("operator fastrnn::new does not exist")\n')
    result = run("-m", "fastrnn", "doctor", cwd=broken_package.parent)
    assert result.returncode == 1
    assert "operator fastrnn::new does not exist" in result.stdout


def test_importing_without_the_compiled_part_points_to_the_doctor(broken_package):
    result = run("-c", "import fastrnn", cwd=broken_package.parent)
    assert "ImportError" in result.stderr
    assert "python -m fastrnn doctor" in result.stderr.splitlines()[-1]


def test_a_torch_that_is_too_old_is_broken(capsys, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    status, checks = diagnose(capsys)
    assert status == 1
    assert "older than 2.10" in checks["torch"]["found"]
    assert "pip install" in checks["torch"]["advice"]


def test_more_threads_than_cores_are_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "available_cores", lambda: 1.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    check = doctor.check_threads()
    assert check.status == "warning"
    assert "set_num_threads(1)" in check.advice


def test_a_gpu_without_kernels_is_a_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A GPU")
    monkeypatch.setattr(_cuda, "missing", lambda: "they do not load")
    check = doctor.check_cuda()
    assert check.status == "warning"
    assert "A GPU" in check.found
    assert "set_strict" in check.advice


def test_a_gpu_that_is_too_old_is_a_warning(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A GPU")
    monkeypatch.setattr(_cuda, "missing", lambda: None)
    monkeypatch.setattr(_cuda, "device_reason", lambda index: "it is too old")
    monkeypatch.setattr(doctor, "has_cuda_kernels", lambda: True)
    assert "too old" in doctor.check_cuda().found


def test_missing_extras_are_a_note_with_the_command(monkeypatch):
    monkeypatch.setattr(doctor, "EXTRAS", {"train": ("no_such_module",)})
    check = doctor.check_extras()
    assert check.status == "note"
    assert "no_such_module" in check.found
    assert "fastrnn[train]" in check.advice
