"""Tables and pictures of runs stand whatever the runs are called; what cannot be compared is named."""

from pathlib import Path

import pytest

from fastrnn.training.cli import main
from fastrnn.training.sweep import show

LOG = "step,train/loss,val/loss,speed/seconds,speed/tokens_per_s\n"


def write(folder: Path, rows: str = "0,1.5,,2,300\n1,1.25,0.5,4,300\n", header: str = LOG) -> str:
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(header + rows, encoding="utf-8")
    return str(folder)


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(tmp_path)


def test_runs_of_any_name_are_told_apart(capsys: pytest.CaptureFixture) -> None:
    names = ["[red]", "[/]", "[bold]x[/bold]", "$a_$b^", "_hidden", "x" * 200 + "1", "x" * 200 + "2"]
    assert main(["compare", *(write(Path(name)) for name in names), "--metric=loss"]) == 0
    table = capsys.readouterr().out.partition(" beside ")[0]
    assert all(name in table for name in names[:5])
    rows = ["".join(part.split()[1] for part in row.splitlines()) for row in folded(table)]
    assert set(names) <= set(rows)
    assert table.count("1.25") == len(names)  # the numbers are whole
    assert Path("compare.png").stat().st_size > 1000


def folded(table: str) -> list[str]:
    """The rows of a table: a line with numbers begins one, lines without go on with it."""
    rows: list[str] = []
    for line in (line.replace("│", "| ") for line in table.splitlines() if line.startswith("│")):
        name, _, numbers = line.removeprefix("| ").partition("|")
        if numbers.strip("| "):
            rows.append("")
        rows[-1] += f"| {name.strip()}\n"
    return rows


def test_a_sweep_of_lists_and_long_values_is_shown(capsys: pytest.CaptureFixture) -> None:
    key = "model.stack.hidden_size_of_a_long_key"
    show([{"data.columns": "[/a]", key: "y" * 150, "val/[loss]": 0.25, "failed": "", "sorted by": 0.25}])
    shown = capsys.readouterr().out
    assert "[/a]" in shown
    assert "[loss]" in shown
    assert shown.count("y") == 151  # each, and that of the key


@pytest.mark.parametrize(
    ("content", "more", "words"),
    [
        ({"rows": ""}, [], "metrics.csv has no rows: that run has logged nothing"),
        ({"rows": "", "header": ""}, [], "metrics.csv has no rows"),
        (
            {"rows": "0,abc,,,\n"},
            [],
            "metrics.csv is not the log of a run: could not convert string to float",
        ),
        ({"rows": "0,1,2,3,4,5,6\n"}, [], "metrics.csv is not the log of a run"),
        ({}, ["--metric=bpc"], "no run has a metric bpc; there are loss"),
        ({}, ["--metric=tokens_per_s"], "no run has a metric tokens_per_s; there are loss"),
        ({}, ["--out=absent/x.png"], "cannot write absent/x.png: "),
        ({}, ["--out=x.xyz"], "cannot write x.xyz: "),
        ({}, ["--out=."], "cannot write .: "),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    content: dict, more: list[str], words: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["compare", write(Path("good")), write(Path("other"), **content), *more]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_runs_without_times_are_compared(capsys: pytest.CaptureFixture) -> None:
    untimed = write(Path("untimed"), "0,1,,,\n1,2,,0,\n2,3")  # the last line is still being written
    assert main(["compare", untimed, write(Path("timed"))]) == 0
    assert "nanx" in capsys.readouterr().out
