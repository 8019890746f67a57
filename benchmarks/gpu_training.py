"""The training command line on a device, from fit to the report: every command, and what it must have left.

    python benchmarks/gpu_training.py OUT [--steps N] [--small] [ARGUMENT...]

Fit of the shipped character model for N steps, fit that goes on from its checkpoint, validate, test, predict,
a sweep, a fit of two other tasks, and one with DDP over a single process. The ARGUMENTs go to every command;
without any it is ``--trainer.accelerator=gpu``. ``--small`` is for tests. Prints one line a command; the
status is 1 if any has failed.
"""

import argparse
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fastrnn.training.cli import main as train

TINY = {
    "shakespeare": ["--data.k1=8", "--model.stack.hidden_size=8"],
    "japanese_vowels": ["--model.stack.hidden_size=8"],
    "co2": ["--data.window=20", "--data.season=20", "--data.horizon=3", "--model.stack.hidden_size=8"],
    "adding": ["--data.length=8", "--model.stack.hidden_size=8"],
}
Command = tuple[str, list[str], Callable[[], None]]  # name, arguments, what to look at after it


def commands(out: Path, steps: int, small: bool, ddp: bool) -> Iterator[Command]:
    def common(name: str, *more: str) -> list[str]:
        few = ["--trainer.limit_val_batches=2", "--trainer.limit_test_batches=2"]
        tiny = [*TINY[name], "--report.compare=false"] if small else []
        return ["--config", name, f"--runs={out}", *few, *tiny, *more]

    every = f"--trainer.val_check_interval={max(1, steps // 2)}"
    run = out / "shakespeare/version_0"
    best, last = (f"--ckpt_path={run}/checkpoints/{name}.ckpt" for name in ("best", "last"))
    fit = [every, f"--flow.every_n_steps={max(1, steps // 4)}", f"--last.every_n_train_steps={steps}"]
    yield (
        "fit",
        ["fit", *common("shakespeare", f"--trainer.max_steps={steps}", *fit, "--report.compare=true")],
        lambda: whole(run, "Sample", "Gradient flow", "Speed", "time of torch.nn"),
    )
    yield (
        "resume",
        ["fit", *common("shakespeare", f"--trainer.max_steps={steps + steps // 2}", *fit, last)],
        lambda: whole(out / "shakespeare/version_1", "Sample", "Gradient flow"),
    )
    for stage in ("validate", "test"):
        yield (stage, [stage, *common("shakespeare", best)], lambda: None)
    prompts = "--data.prompts=['ROMEO:']"
    yield (
        "predict",
        ["predict", *common("shakespeare", best, prompts, "--model.sampling.length=20")],
        lambda: predicted(out / "shakespeare-predict/version_0/predictions.json"),
    )
    grid = common("adding", f"--trainer.max_steps={steps}", "--grid=model.stack.cell=gru,lstm")
    yield (
        "sweep",
        ["sweep", *grid, f"--trainer.limit_train_batches={steps}", "--report.compare=false"],
        lambda: rows_of(out / "adding-sweep.csv", 2),
    )
    for name, word in (("japanese_vowels", "Confusion matrix"), ("co2", "Forecast")):
        settings = common(name, f"--trainer.max_epochs={1 if small else 3}", "--flow.every_n_steps=10")
        yield (
            name,
            ["fit", *settings],
            lambda n=name, w=word: whole(out / f"{n}/version_0", w, "Gradient flow"),
        )
    if ddp:
        settings = common("shakespeare", f"--trainer.max_steps={steps}", every, "--name=ddp")
        yield (
            "ddp",
            ["fit", *settings, "--trainer.strategy=ddp"],
            lambda: whole(out / "ddp/version_0", "Sample"),
        )


def whole(run: Path, *parts: str) -> None:
    """The report has these parts, and no line that says it goes without one."""
    page = (run / "report.html").read_text(encoding="utf-8")
    if missing := re.findall("the report goes without[^<]*", page):
        raise AssertionError("; ".join(missing))
    for part in parts:
        if part not in page:
            raise AssertionError(f"{run}/report.html has no {part}")


def predicted(path: Path) -> None:
    (text,) = json.loads(path.read_text(encoding="utf-8"))
    if not text.startswith("ROMEO:") or len(text) != 26:
        raise AssertionError(f"{path}: {text!r} is not the prompt and 20 characters")


def rows_of(path: Path, count: int) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) != count + 1 or "Error" in "".join(lines):
        raise AssertionError(f"{path}: {lines}")


def main(argv: list[str], ddp: bool = True) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--small", action="store_true")
    own, given = parser.parse_known_args(argv)
    own.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name, arguments, look in commands(own.out, own.steps, own.small, ddp):
        start = time.perf_counter()
        try:
            status = train([*arguments, *(given or ["--trainer.accelerator=gpu"])])
            if status:
                raise AssertionError(f"status {status}")
            look()
            said = "passed"
        except Exception as error:
            logging.exception("%s", name)
            said = f"FAILED: {type(error).__name__}: {error}"
            failed.append(name)
        print(f"== train {name}: {said} ({time.perf_counter() - start:.0f} s)", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
