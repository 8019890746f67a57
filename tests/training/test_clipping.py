"""Clipping, its figures, and the three policies for gradients that are not finite."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from conftest import language_model, trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from fastrnn.training import GradientClipping, InputError, Optim, TextData, clip
from fastrnn.training.clipping import MOST_PENDING
from fastrnn.training.run import LastCheckpoint


def test_clip_returns_the_norm_before_and_limits_norm_and_value() -> None:
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.tensor([3.0, -4.0, 0.0, 0.0])
    assert clip([p], norm=1.0, value=0.7) == pytest.approx(5.0)
    torch.testing.assert_close(p.grad, torch.tensor([0.6, -0.7, 0.0, 0.0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("limit", "share"), [(1e-6, 1.0), (1e6, 0.0)])
@pytest.mark.parametrize("kind", ["norm", "value"])
def test_share_of_clipped_steps_is_logged(
    text: TextData, tmp_path: Path, kind: str, limit: float, share: float
) -> None:
    run = trainer(tmp_path, GradientClipping(**{kind: limit}), max_steps=3)
    run.fit(language_model(text), datamodule=text)
    assert run.logged_metrics["gradient/clipped"] == share
    assert run.logged_metrics["gradient/norm"] > 0.01


class Poison(nn.Module):
    """Linear whose gradient is NaN."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        y.register_hook(lambda g: g * float("nan"))
        return y


def poisoned(text: TextData, tmp_path: Path, policy: str) -> tuple[dict, dict, GradientClipping]:
    model = language_model(text)
    model.head = Poison(model.head)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    clipping = GradientClipping(norm=1.0, nonfinite=policy)
    trainer(tmp_path, clipping, max_steps=2).fit(model, datamodule=text)
    return before, model.state_dict(), clipping


def test_a_nan_gradient_stops_the_run_with_the_parameters_names(text: TextData, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"step 0: .*weight_hh_l0"):
        poisoned(text, tmp_path, "raise")


def half_precision(scale: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


def test_overflows_of_a_grad_scaler_are_skipped_until_its_scale_fits(text: TextData, tmp_path: Path) -> None:
    clipping = GradientClipping(norm=1.0, value=1.0)
    run = trainer(tmp_path, clipping, max_steps=40, plugins=[half_precision(2.0**30)])
    model = language_model(text)
    run.fit(model, datamodule=text)
    assert 5 < clipping.counts["skipped"] < 25
    assert run.scaler.get_scale() == 2.0 ** (30 - clipping.counts["skipped"])
    assert all(v.isfinite().all() for v in model.state_dict().values())


def test_a_nan_gradient_stops_a_run_with_a_grad_scaler_at_scale_1(text: TextData, tmp_path: Path) -> None:
    model = language_model(text)
    model.head = Poison(model.head)
    clipping = GradientClipping(norm=1.0)
    run = trainer(tmp_path, clipping, max_steps=40, plugins=[half_precision(8.0)])
    with pytest.raises(FloatingPointError, match="not finite"):
        run.fit(model, datamodule=text)
    assert clipping.counts["skipped"] == 3


def test_no_gradient_anywhere_is_nothing_to_clip() -> None:
    model = nn.Linear(2, 2)
    model.log = lambda *args: None
    clipping = GradientClipping(norm=1.0, value=1.0)
    logs = SimpleNamespace(should_update_logs=True)
    trainer = SimpleNamespace(
        global_step=0, scaler=None, is_last_batch=False, fast_dev_run=False, _logger_connector=logs
    )
    clipping.on_before_optimizer_step(trainer, model, torch.optim.SGD(model.parameters()))
    assert clipping.counts == {"steps": 1, "clipped": 0, "skipped": 0}


def test_a_nan_gradient_is_skipped_and_counted(text: TextData, tmp_path: Path) -> None:
    before, after, clipping = poisoned(text, tmp_path, "skip")
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert clipping.counts == {"steps": 2, "clipped": 0, "skipped": 2}


def test_a_nan_gradient_is_ignored_when_asked(text: TextData, tmp_path: Path) -> None:
    _, after, _ = poisoned(text, tmp_path, "ignore")
    assert any(v.isnan().any() for v in after.values())


class PoisonedSteps(L.Callback):
    """Gradients that are NaN at some steps; the weights and the optimizer's state after each step."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.after: list[dict[str, torch.Tensor]] = []

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step in self.steps:
            pl_module.head.weight.grad[0, 0] = float("nan")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        found = {f"weight {k}": v.clone() for k, v in pl_module.state_dict().items()}
        for i, state in enumerate(trainer.optimizers[0].state.values()):
            found |= {f"{k} {i}": v.clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
        self.after.append(found)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def fit_poisoned(
    text: TextData, folder: Path, policy: str, optim: Optim, *steps: int, **settings: Any
) -> tuple[PoisonedSteps, GradientClipping]:
    model = language_model(text)
    model.optim = optim
    poison, clipping = PoisonedSteps(*steps), GradientClipping(norm=1.0, nonfinite=policy)
    run = trainer(folder, poison, clipping, **{"log_every_n_steps": 1000, "max_steps": 6, **settings})
    if policy == "raise":
        with pytest.raises(FloatingPointError, match=r"step 2: head\.weight$"):
            run.fit(model, datamodule=text)
    else:
        run.fit(model, datamodule=text)
    return poison, clipping


OPTIMS = [Optim("sgd", momentum=0.9), Optim("sgd"), Optim("adam"), Optim("adamw"), Optim("rmsprop")]


@pytest.mark.parametrize("optim", OPTIMS, ids=lambda optim: optim.name)
def test_a_skipped_step_leaves_weights_and_moments_as_they_were(
    text: TextData, tmp_path: Path, optim: Optim
) -> None:
    """The first step, from which an optimizer has no moments yet, and one in the middle; none is logged."""
    poison, clipping = fit_poisoned(text, tmp_path, "skip", optim, 0, 3)
    before = language_model(text).state_dict()
    assert all(torch.equal(poison.after[0][f"weight {k}"], v) for k, v in before.items())
    changed = [not same(a, b) for a, b in pairwise(poison.after)]
    assert changed == [True, True, False, True, True]
    assert all(v.isfinite().all() for v in poison.after[-1].values())
    assert clipping.counts == {"steps": 6, "clipped": clipping.counts["clipped"], "skipped": 2}
    if optim.name != "rmsprop":  # which counts its steps, but does not use the count
        assert {float(v) for k, v in poison.after[-1].items() if k.startswith("step ")} <= {4.0}


@pytest.mark.parametrize("optim", OPTIMS, ids=lambda optim: optim.name)
@pytest.mark.parametrize(
    ("end", "settings"), [(6, {}), (5, {"log_every_n_steps": 5}), (4, {"val_check_interval": 4})]
)
def test_a_run_that_a_nan_ends_keeps_the_weights_from_before_it(
    text: TextData, tmp_path: Path, optim: Optim, end: int, settings: dict[str, int]
) -> None:
    """It ends where the norms are read: at its end, at a logged step, before a validation."""
    poison, _ = fit_poisoned(text, tmp_path, "raise", optim, 2, **settings)
    waits = optim.name == "rmsprop"
    assert len(poison.after) == (2 if waits else 6 if end == 6 else 4)
    assert all(same(poison.after[1], later) for later in poison.after[2:])


def test_a_nan_ends_a_run_after_50_steps_at_the_latest(text: TextData, tmp_path: Path) -> None:
    poison, _ = fit_poisoned(text, tmp_path, "raise", Optim(), 2, max_steps=90)
    assert len(poison.after) == MOST_PENDING - 1


def test_a_run_after_one_that_a_nan_has_ended_trains_again(text: TextData, tmp_path: Path) -> None:
    clipping, poison = GradientClipping(), PoisonedSteps(1)
    with pytest.raises(FloatingPointError):
        trainer(tmp_path, poison, clipping, max_steps=3, log_every_n_steps=9).fit(language_model(text), text)
    again = PoisonedSteps()
    trainer(tmp_path, again, clipping, max_steps=3).fit(language_model(text), text)
    assert not any(same(a, b) for a, b in pairwise(again.after))


def test_a_norm_that_overflows_is_named_as_such() -> None:
    model = nn.Linear(1, 1)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1.5e19)  # whose square is in float32, and twice its square is not
    clipping, optimizer = GradientClipping(), torch.optim.SGD(model.parameters())
    with pytest.raises(FloatingPointError, match="the norm of all together overflows"):
        clipping.on_before_optimizer_step(SimpleNamespace(global_step=0, scaler=None), model, optimizer)


def test_no_checkpoint_is_written_of_a_run_that_a_nan_has_ended(text: TextData, tmp_path: Path) -> None:
    last = LastCheckpoint(every_n_train_steps=4)
    last.dirpath = str(tmp_path)
    model = language_model(text)
    run = trainer(
        tmp_path, PoisonedSteps(2), GradientClipping(), last, log_every_n_steps=1000, max_steps=9,
        enable_checkpointing=True,
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match="step 2"):
        run.fit(model, datamodule=text)
    assert not list(tmp_path.glob("**/*.ckpt"))


@pytest.mark.parametrize("limits", [{"norm": 0.0}, {"norm": -1.0}, {"value": float("nan")}, {"value": 0}])
def test_limits_that_are_not_above_0_are_refused(limits: dict[str, float]) -> None:
    words = rf"clipping.{next(iter(limits))} must be a number in \(0, inf\)"
    with pytest.raises(InputError, match=words):
        GradientClipping(**limits)
    with pytest.raises(InputError, match=words):
        clip([], **{"norm": None, "value": None, **limits})


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(InputError, match="raise, skip, ignore"):
        GradientClipping(nonfinite="hope")


def test_biases_and_norms_are_left_alone_by_weight_decay_unless_asked() -> None:
    model = nn.LSTM(3, 4)
    groups = Optim(name="adamw", weight_decay=0.1).optimizer(model.parameters()).param_groups
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.1, 2), (0.0, 2)]
    optim = Optim(name="sgd", weight_decay=0.1, decay_all=True)
    assert [len(g["params"]) for g in optim.optimizer(model.parameters()).param_groups] == [4]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "exponential"])
def test_schedules_warm_up_to_lr_and_end_at_the_floor(schedule: str) -> None:
    optim = Optim(schedule=schedule, warmup=10, floor=0.05)
    factors = [optim.factor(step, 100) for step in range(101)]
    assert factors[:10] == [(i + 1) / 10 for i in range(10)]
    assert max(factors) == 1.0
    assert factors[-1] == (1.0 if schedule == "constant" else 0.05)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "rmsprop"])
def test_every_optimizer_lowers_a_loss(name: str) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = Optim(name=name, lr=0.05).optimizer([p])
    for _ in range(20):
        optimizer.zero_grad()
        p.square().sum().backward()
        optimizer.step()
    assert p.square().sum() < 1.0
