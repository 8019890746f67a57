"""README.md: its code runs, its links lead somewhere, and its table of speed can be filled in."""

import re
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastrnn.bench.measure import Quartiles
from fastrnn.bench.results import Record, Results

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def run(code: str) -> dict:
    namespace: dict = {}
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), namespace)
    return namespace


def test_the_classic_loop_learns():
    assert run(BLOCKS[0])["loss"] < 0.02  # predicting the mean of a sine gives 0.5


@pytest.mark.parametrize("code", BLOCKS[1:])
def test_code_block_runs(code):
    run(code)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text())
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.fixture
def tool():
    return runpy.run_path(str(ROOT / "benchmarks" / "readme.py"), run_name="readme")


def record(case: str, ratio: float) -> Record:
    ms, ratios = {"torch": ratio, "fastrnn": 1.0}, {"torch": Quartiles(ratio, ratio, ratio)}
    return Record(case, "LSTM training", "train", 2, ms, ratios, 1.0, 0.5, 10, 0, False)


def test_table_of_speed_names_best_and_worst_and_counts_losses(tool):
    environment = {"cpu": "C", "kernels": "avx2", "torch": "2.13.0", "date": "2026-01-02T03:04:05"}
    text = tool["table"](Results(environment, [record("a", 0.5), record("b", 4.0), record("c", 0.5)]))
    assert text.splitlines()[-1] == "| LSTM training | 2 | 3 | **1.00** | 4.00 (b) | 0.50 (a) | 2 |"


def test_table_of_speed_has_a_column_for_each_other_peer(tool):
    environment = {"cpu": "C", "kernels": "avx2", "torch": "2.13.0", "date": "2026-01-02T03:04:05"}
    timed, other = record("a", 2.0), record("b", 2.0)
    timed.ratios["onnxruntime"] = Quartiles(1.5, 1.5, 1.5)
    lines = tool["table"](Results(environment, [timed, other])).splitlines()
    assert lines[-3].endswith("| onnxruntime: mean, worst |")
    assert lines[-1].endswith("| none | 1.50, 1.50 |")


def test_table_of_speed_replaces_what_is_between_the_markers_and_nothing_else(tool):
    changed = tool["insert"](README, "TABLE")
    assert tool["insert"](changed, "OTHER") == changed.replace("TABLE", "OTHER")
    assert re.sub("begin -->.*<!-- speed", "", changed, flags=re.DOTALL) == re.sub(
        "begin -->.*<!-- speed", "", README, flags=re.DOTALL
    )


def test_readme_has_the_classes_that_matter_as_the_documentation_has_them(tool):
    def means(page: str) -> set[tuple[str, ...]]:  # class, threads, shapes, mean, best, worst, losses
        rows = [line.split(" | ") for line in page.splitlines() if "**" in line and line.startswith("| ")]
        return {tuple(cell.strip("| ") for cell in row[:7]) for row in rows}

    assert {row[0] for row in means(README)} == set(tool["MATTER"])
    assert means(README) - means((ROOT / "docs/performance.md").read_text()) == set()
    other = replace(record("b", 1.0), group="stacks training")
    assert tool["shortened"](Results({}, [record("a", 2.0), other])).records == [record("a", 2.0)]


def test_readme_without_markers_is_refused(tool):
    with pytest.raises(ValueError, match="must hold"):
        tool["insert"]("# fastrnn", "TABLE")
