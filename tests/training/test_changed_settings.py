"""Training that goes on with other settings than it began with: used and said, or refused."""

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from conftest import TEXT, trainer

from fastrnn.training import (
    Forecaster,
    InputError,
    JapaneseVowels,
    LanguageModel,
    MemoryData,
    Optim,
    SequenceClassifier,
    SeriesData,
    Stack,
    TextData,
)
from fastrnn.training.run import AtomicCheckpoints

SMALL = Stack(hidden_size=4)
OPTIM = Optim(name="adamw", lr=0.01, schedule="cosine", warmup=2, weight_decay=0.1)


def language(text: str, optim: Optim = OPTIM, data: dict | None = None, **model: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    parts = TextData([text], **{"rows": 4, "k1": 16, **(data or {})})
    return LanguageModel(parts.spec, **{"stack": SMALL, "optim": optim, "embedding_size": 4, **model}), parts


def memory(task: dict | None = None, **data: Any) -> tuple[Any, Any]:
    parts = MemoryData(**{"length": 4, "batch_size": 2, "epoch": 6, "evaluation": 1, **data})
    return Forecaster(parts.spec, SMALL, **(task or {})), parts


def fit(
    folder: Path, made: tuple[Any, Any], steps: int, ckpt: Path | None = None, **settings: Any
) -> L.Trainer:
    run = trainer(folder, max_steps=steps, limit_val_batches=0, **settings)
    run.fit(made[0], datamodule=made[1], ckpt_path=ckpt)
    return run


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    caplog.set_level(logging.INFO)
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).propagate = True
    return lambda: caplog.text


class Rates(L.Callback):
    """The learning rate of each step."""

    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.seen[trainer.global_step] = optimizer.param_groups[0]["lr"]


def test_another_optimizer_setting_is_used_and_said(
    text_file: str, tmp_path: Path, said: Callable[[], str]
) -> None:
    fit(tmp_path, language(text_file), 3).save_checkpoint(tmp_path / "a.ckpt")
    changed = Optim(name="adamw", lr=0.2, schedule="linear", warmup=2, weight_decay=0.3, beta2=0.9)
    run = trainer(tmp_path, rates := Rates(), max_steps=6, limit_val_batches=0)
    model, data = language(text_file, changed)
    run.fit(model, datamodule=data, ckpt_path=tmp_path / "a.ckpt")
    assert rates.seen == {step: pytest.approx(0.2 * changed.factor(step, 6)) for step in (3, 4, 5)}
    decayed, plain = run.optimizers[0].param_groups
    assert (decayed["weight_decay"], plain["weight_decay"], decayed["betas"]) == (0.3, 0.0, (0.9, 0.9))
    assert run.optimizers[0].state[model.head.weight]["step"] == 6  # its moments went on
    for words in ("optim.lr=0.2 (0.01 until now)", "optim.weight_decay=0.3 (0.1 until now)", "from step 3"):
        assert words in said()


def test_a_longer_run_has_the_schedule_of_its_own_length(text_file: str, tmp_path: Path) -> None:
    fit(tmp_path, language(text_file), 3).save_checkpoint(tmp_path / "a.ckpt")
    run = trainer(tmp_path, rates := Rates(), max_steps=9, limit_val_batches=0)
    model, data = language(text_file)
    run.fit(model, datamodule=data, ckpt_path=tmp_path / "a.ckpt")
    assert rates.seen == {step: pytest.approx(0.01 * OPTIM.factor(step, 9)) for step in range(3, 9)}


def test_a_learning_rate_of_zero_learns_nothing_more(text_file: str, tmp_path: Path) -> None:
    first = language(text_file)
    fit(tmp_path, first, 3).save_checkpoint(tmp_path / "a.ckpt")
    second = language(text_file, Optim(**{**asdict(OPTIM), "lr": 0.0}))
    fit(tmp_path, second, 6, tmp_path / "a.ckpt")
    for name, value in first[0].state_dict().items():
        assert torch.equal(value, second[0].state_dict()[name]), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optim": Optim(name="sgd")}, "optim.name is adamw there, sgd here"),
        ({"optim": Optim(name="adamw", decay_all=True)}, "optim.decay_all is False there, True here"),
        ({"data": {"rows": 8}}, "rows is 4 there, 8 here"),
        ({"data": {"k1": 8, "k2": 8}}, "k1 is 16 there, 8 here"),
        ({"data": {"held_out": (0.2, 0.2)}}, "symbols is [0-9]+ there, [0-9]+ here"),
        ({"data": {"limit": 2000}}, "symbols is [0-9]+ there, [0-9]+ here"),
        ({"embedding_size": 8}, "embedding_size is 4 there, 8 here"),
        ({"stack": Stack(cell="gru", hidden_size=4)}, "stack.cell is 'lstm' there, 'gru' here"),
    ],
)
def test_what_a_text_model_cannot_go_on_with_is_refused(
    change: dict[str, Any], words: str, text_file: str, tmp_path: Path
) -> None:
    fit(tmp_path, language(text_file), 2).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=words):
        fit(tmp_path, language(text_file, **change), 4, tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 4}, "batch_size is 2 there, 4 here"),
        ({"length": 6}, "length is 4 there, 6 here"),
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"epoch": 8}, "epoch is 6 there, 8 here"),
        ({"task": {"centre": True}}, "centre is False there, True here"),
    ],
)
def test_what_a_forecaster_cannot_go_on_with_is_refused(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    fit(tmp_path, memory(), 2).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=words):
        fit(tmp_path, memory(**change), 4, tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("data", "task"),
    [
        (lambda size: SeriesData("sunspots", window=8, horizon=2, batch_size=size), Forecaster),
        (lambda size: JapaneseVowels(size), SequenceClassifier),
    ],
)
def test_another_batch_size_is_refused(data: Callable[[int], Any], task: type, tmp_path: Path) -> None:
    first, other = data(4), data(8)
    fit(tmp_path, (task(first.spec, SMALL), first), 2).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(InputError, match="batch_size is 4 there, 8 here"):
        fit(tmp_path, (task(other.spec, SMALL), other), 4, tmp_path / "a.ckpt")


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.filterwarnings("ignore::fastrnn.FallbackWarning")
def test_another_precision_is_used_and_said(
    precision: str, text_file: str, tmp_path: Path, said: Callable[[], str]
) -> None:
    fit(tmp_path, language(text_file), 2).save_checkpoint(tmp_path / "a.ckpt")
    assert fit(tmp_path, language(text_file), 4, tmp_path / "a.ckpt", precision=precision).global_step == 4
    assert f"precision={precision} (32-true until now)" in said()


def test_what_else_changed_is_said_and_whether_it_has_an_effect(
    text_file: str, tmp_path: Path, said: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    fit(tmp_path, language(text_file), 2).save_checkpoint(tmp_path / "a.ckpt")
    fit(tmp_path, language(text_file), 3, tmp_path / "a.ckpt")
    assert "until now" not in said()
    monkeypatch.setenv("PL_GLOBAL_SEED", "2")
    stack = Stack(hidden_size=4, forget_bias=3.0, backend="torch")
    fit(tmp_path, language(text_file, stack=stack, dropout=0.5), 4, tmp_path / "a.ckpt")
    assert "going on from step 2 with dropout=0.5 (0.0 until now), stack.backend=torch" in said()
    assert "stack.forget_bias=3.0 (0.0 until now) has no effect" in said()
    assert "seed_everything=2 (1 until now) has no effect" in said()


def test_an_optimizer_does_not_matter_to_a_test(text_file: str, tmp_path: Path) -> None:
    fit(tmp_path, language(text_file), 2).save_checkpoint(tmp_path / "a.ckpt")
    model, data = language(text_file, Optim(name="sgd", decay_all=True))
    assert trainer(tmp_path).test(model, datamodule=data, ckpt_path=tmp_path / "a.ckpt", verbose=False)


def test_a_checkpoint_that_is_none_says_what_it_is(text_file: str, tmp_path: Path) -> None:
    run = fit(tmp_path, language(text_file), 2)
    run.save_checkpoint(tmp_path / "a.ckpt")
    whole = torch.load(tmp_path / "a.ckpt", weights_only=True)
    without = {k: {key: v for key, v in whole.items() if key != k} for k in ("optimizer_states", "structure")}
    for content, words in (
        (torch.ones(3), "is not a checkpoint of a run but a Tensor"),
        ({"a": 1}, "is not a checkpoint of a run but a dictionary of a"),
        (whole["state_dict"], "is not a checkpoint of a run but a dictionary of embed.weight"),
        (without["optimizer_states"], "it holds no state of an optimizer"),
        (without["structure"], "is not of one of fastrnn.training's tasks"),
    ):
        torch.save(content, tmp_path / "b.ckpt")
        with pytest.raises(InputError, match=words):
            fit(tmp_path, language(text_file), 4, tmp_path / "b.ckpt")
    (tmp_path / "text.ckpt").write_text(TEXT)
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "folder.ckpt").mkdir()
    for name in ("text", "empty", "folder"):
        with pytest.raises(InputError, match=rf"{name}\.ckpt is not a readable checkpoint: \w+"):
            AtomicCheckpoints().load_checkpoint(tmp_path / f"{name}.ckpt")
