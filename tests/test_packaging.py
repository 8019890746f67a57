"""What is shipped, what building says when it cannot, and what importing costs."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs a checkout")


def setup_py(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    variables = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


# ---- What is shipped ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built in the checkout's own objects, so that only what has changed is compiled."""
    folder = tmp_path_factory.mktemp("wheel")
    built = setup_py(
        "egg_info", "--egg-base", str(folder),
        "build", "--build-lib", str(folder / "lib"),
        "bdist_wheel", "--dist-dir", str(folder), "--bdist-dir", str(folder / "bdist"),
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    built = setup_py("egg_info", "--egg-base", str(folder), "sdist", "--dist-dir", str(folder))
    assert built.returncode == 0, built.stderr
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def test_one_wheel_for_every_python(wheel):
    assert "-cp310-abi3-linux" in wheel.name


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    outside = {name for name in names if not re.match(r"fastrnn(/|-[\d.]+\.dist-info/)", name)}
    assert outside == set()
    assert [name for name in names if Path(name).suffix in (".cpp", ".h", ".inc", ".a", ".o")] == []
    assert [name for name in names if name.endswith(".so")] == ["fastrnn/_C.abi3.so"]


def test_wheel_holds_every_file_of_the_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "fastrnn"
    ours = {
        str(p.relative_to(ROOT)) for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    assert {name for name in ours if not name.endswith((".so", ".pyc"))} - names == set()
    assert "fastrnn/py.typed" in names


def test_binary_names_no_folder_of_the_builder(wheel):
    binary = zipfile.ZipFile(wheel).read("fastrnn/_C.abi3.so")
    for folder in (ROOT, Path(torch.__file__).parent, Path(sys.prefix), Path.home()):
        assert f"{folder}/".encode() not in binary, folder


def test_the_version_is_that_of_the_package(wheel):
    found = re.search(r'^__version__ = "(.*)"', (ROOT / "fastrnn/__init__.py").read_text(), re.MULTILINE)
    assert wheel.name.startswith(f"fastrnn-{found[1]}-")


def test_sdist_can_build_and_test(sdist):
    includes = {
        f"csrc/{name}"
        for source in (ROOT / "csrc").rglob("*.*")
        if "testing" not in source.parts
        for name in re.findall(r'^#include "(.*)"', source.read_text(), re.MULTILINE)
    }
    assert includes
    assert includes - sdist == set()
    needed = {
        "setup.py",
        "pyproject.toml",
        "Makefile",
        "mkdocs.yml",
        "constraints.txt",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
    }
    assert needed - sdist == set()
    tests = {str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("*.py")}
    testing = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc/testing").glob("*.*") if p.suffix != ".so"}
    assert (tests | testing) - sdist == set()
    assert [name for name in sdist if name.endswith((".so", ".pyc", ".o"))] == []


# ---- What building says when it cannot ---------------------------------------------------------------


def refusal(result: subprocess.CompletedProcess) -> str:
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]


def test_old_torch_is_refused(tmp_path):
    (tmp_path / "torch.py").write_text('__version__ = "2.9.1"')
    message = refusal(setup_py("build_ext", PYTHONPATH=str(tmp_path)))
    assert message == "fastrnn: building needs torch>=2.10, found 2.9.1."


def test_missing_torch_is_refused(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError")
    assert "needs torch; install it first" in refusal(setup_py("build_ext", PYTHONPATH=str(tmp_path)))


def test_missing_compiler_is_refused():
    message = refusal(setup_py("build_ext", CXX="no-such-compiler"))
    assert "'no-such-compiler' was not found" in message
    assert "apt install g++" in message


def test_old_compiler_is_refused(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    assert "is not: g++ 11 or newer is" in refusal(setup_py("build_ext", CXX=str(compiler)))


def test_other_platform_is_refused(tmp_path):
    script = "import runpy, setuptools, sys; sys.platform = 'win32'; runpy.run_path('setup.py')"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert refusal(result) == "fastrnn: builds on Linux only so far, not on win32."


# ---- What importing costs ----------------------------------------------------------------------------


def python(script: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def test_import_takes_less_than_300_ms_beyond_torch():
    script = "import time, torch; t = time.perf_counter(); import fastrnn; print(time.perf_counter() - t)"
    assert min(float(python(script)) for _ in range(3)) < 0.3


def test_import_brings_no_optional_package():
    optional = "{'lightning', 'matplotlib', 'rich', 'torchmetrics'}"
    assert python(f"import sys, fastrnn; print(*{optional} & sys.modules.keys())").split() == []
