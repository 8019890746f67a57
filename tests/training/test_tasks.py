"""The three tasks learn, measure and predict, on fastrnn and on torch.nn alike."""

import math
from pathlib import Path

import pytest
import torch
from conftest import language_model, trainer
from torch.nn import functional as F

from fastrnn.training import (
    Forecaster,
    InputError,
    JapaneseVowels,
    LanguageModel,
    MemoryData,
    Optim,
    SequenceBatch,
    SequenceClassifier,
    SeriesData,
    Stack,
    TextData,
)
from fastrnn.training.clipping import GradientClipping
from fastrnn.training.data.batches import WindowBatches
from fastrnn.training.forecasting import SHOWN
from fastrnn.training.language import Sampling
from fastrnn.training.speed import compare_backends

BACKENDS = ["fastrnn", "torch"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_language_model_learns_and_both_backends_agree(text: TextData, tmp_path: Path, backend: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel(text.spec, Stack(hidden_size=32, backend=backend), Optim(lr=0.02))
    run = trainer(tmp_path, max_epochs=2)
    run.fit(model, datamodule=text)
    seen = run.logged_metrics
    assert seen["val/bpc"] < 2.2 < math.log2(len(model.vocabulary))
    assert seen["val/perplexity"] == pytest.approx(2 ** float(seen["val/bpc"]), rel=1e-4)
    # The same seed gives the same curve in both libraries, up to rounding.
    assert float(seen["val/bpc"]) == pytest.approx(CURVE.setdefault("bpc", float(seen["val/bpc"])), rel=0.02)


CURVE: dict[str, float] = {}


def test_a_chunk_without_targets_has_no_loss_and_no_gradient(text: TextData) -> None:
    model = language_model(text)
    batch = text.batches("train", 0, 1).batch(0, 0)
    loss = model.loss_of(batch._replace(y=torch.full_like(batch.y, -100)))
    assert float(loss.detach()) == 0.0
    loss.backward()
    assert not model.head.weight.grad.any()


def test_generation_is_seeded_bounded_and_checked(text: TextData) -> None:
    model = language_model(text)
    assert model.generate("line", 20, seed=1) == model.generate("line", 20, seed=1)
    assert len(model.generate("line", 20)) == 24
    greedy = model.generate("line", 20, temperature=0)
    assert greedy == model.generate("line", 20, top_k=1)
    assert model.training
    with pytest.raises(InputError, match="'é'"):
        model.generate("é")
    with pytest.raises(InputError, match="at least one character"):
        model.generate("")


def test_classifier_reads_only_valid_steps() -> None:
    data = JapaneseVowels(batch_size=5)
    batch = data.batches("test", 0, 1).batch(0, 0)
    padded = torch.cat([batch.x, torch.full((4, *batch.x.shape[1:]), 7.0)])
    for pool in ("last", "mean", "max"):
        stack = Stack(hidden_size=8, bidirectional=True)
        model = SequenceClassifier(data.spec, stack, pool=pool).eval()
        together = model(batch.x, batch.lengths)
        torch.testing.assert_close(model(padded, batch.lengths), together)
        for i, n in enumerate(batch.lengths.tolist()):
            alone = model(batch.x[:n, i : i + 1], torch.tensor([n]))
            torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-4)


def test_classifier_metrics_are_accuracy_and_macro_f1(tmp_path: Path) -> None:
    data = JapaneseVowels(batch_size=64)
    model = SequenceClassifier(data.spec, Stack(hidden_size=16), Optim(lr=0.01))
    run = trainer(tmp_path, max_epochs=4)
    run.fit(model, datamodule=data)
    (found,) = run.test(model, datamodule=data, verbose=False)
    with torch.no_grad():
        batches = list(data.batches("test", 0, 1))
        guess = torch.cat([model.eval()(b.x, b.lengths).argmax(-1) for b in batches])
    truth = torch.cat([b.y for b in batches])
    assert found["test/accuracy"] == pytest.approx(float((guess == truth).float().mean()))
    f1 = []
    for c in range(9):
        hit = float(((guess == c) & (truth == c)).sum())
        f1.append(2 * hit / float((guess == c).sum() + (truth == c).sum()))
    assert found["test/f1"] == pytest.approx(sum(f1) / 9, rel=1e-5)
    (predictions, *_) = run.predict(model, datamodule=data)
    assert predictions[0]["class"] in data.spec["classes"]


@pytest.mark.parametrize(
    ("loss", "function"), [("mse", F.mse_loss), ("mae", F.l1_loss), ("huber", F.huber_loss)]
)
@pytest.mark.parametrize("centre", [False, True])
def test_forecaster_feeds_its_outputs_back(loss: str, function, centre: bool) -> None:  # type: ignore
    data = SeriesData("sunspots", window=30, horizon=3, batch_size=4)
    model = Forecaster(data.spec, Stack(hidden_size=8), loss=loss, centre=centre).eval()
    batch = data.batches("val", 0, 1).batch(0, 0)
    ahead = model(batch.x, batch.lengths, 3)
    longer = batch.x
    for k in range(3):  # each forecast, appended to the past, gives the next one
        step = model(longer, torch.full((4,), len(longer))) if not centre else ahead[k : k + 1]
        torch.testing.assert_close(step[0], ahead[k], atol=1e-2, rtol=1e-3)
        longer = torch.cat([longer, ahead[k : k + 1]])
    origin = batch.x[-1:] if centre else torch.tensor(data.spec["mean"])
    scaled = [(v - origin) / torch.tensor(data.spec["scale"]) for v in (ahead, batch.y)]
    found = float(model.loss_of(batch).detach())
    assert found == pytest.approx(float(function(*scaled).detach()), rel=1e-4)


def test_seasonal_naive_forecast_is_the_value_one_season_before() -> None:
    model = Forecaster({"mean": [0.0], "scale": [1.0], "outputs": 1, "columns": ["a"], "season": 4})
    wave = torch.arange(16.0) % 4
    batch = SequenceBatch(wave[:10].view(10, 1, 1), torch.tensor([10]), wave[10:16].view(6, 1, 1))
    assert torch.equal(model._naive(batch), batch.y)


SERIES = {"mean": [0.0], "scale": [1.0], "outputs": 1, "columns": ["a"], "season": None}


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_a_series_far_from_zero_is_learnt_like_the_same_one_at_zero(tmp_path: Path, precision: str) -> None:
    """1e8 + a wave, a time stamp, 1e-30 times the wave, and a column that changes after training only."""
    found = []
    for shift, unit, name in ((0, 1.0, "near"), (1e8, 1.0, "far"), (0, 1e-30, "small")):
        rows = [f"{shift + unit * math.sin(i / 3)!r},{0.1 if i < 340 else 0.2}\n" for i in range(400)]
        path = tmp_path / f"{name}.csv"
        path.write_text("wave,still\n" + "".join(rows))
        data = SeriesData(str(path), ["wave", "still"], window=20, horizon=2, held_out=(0.1, 0.1))
        torch.manual_seed(0)
        model = Forecaster(data.spec, Stack(hidden_size=8), Optim(lr=0.01))
        run = trainer(tmp_path, max_epochs=2, precision=precision)
        run.fit(model, datamodule=data)
        (tested,) = run.test(model, datamodule=data, verbose=False)
        shown = run.predict(model, datamodule=data)[0]
        assert shown.dtype == torch.float64
        found.append((tested, (shown[..., 0] - shift) / unit))
    rough = 0.2 if precision == "bf16-mixed" else 1e-3
    for tested, shown in found[1:]:
        assert tested["test/loss"] == pytest.approx(found[0][0]["test/loss"], rel=rough)
        torch.testing.assert_close(shown, found[0][1], rtol=0, atol=rough)
    assert found[0][0]["test/loss"] < 1
    # the RMSE of both columns together: of the wave alone where the other one's error is in its shadow
    assert found[1][0]["test/rmse"] == pytest.approx(found[0][0]["test/rmse"], rel=rough)


@pytest.mark.parametrize("unit", [1e-30, 1e30])
def test_errors_are_measured_in_any_unit(unit: float) -> None:
    """The square of either unit is beyond float32."""
    wave = torch.sin(torch.arange(40, dtype=torch.float64))[:, None]
    found = []
    for scale in (1.0, unit):
        torch.manual_seed(0)
        model = Forecaster({**SERIES, "scale": [scale]}, Stack(hidden_size=4)).eval()
        model.log = lambda name, value, into=found, **kwargs: into.append((name, float(value)))
        model.on_test_epoch_start()
        with torch.no_grad():
            model.test_step(WindowBatches(scale * wave, 10, 2, 29, None).batch(0, 0), 0)
        model.on_test_epoch_end()
    near, far = dict(found[: len(found) // 2]), dict(found[len(found) // 2 :])
    for name in ("test/rmse", "test/mae", "test/naive_rmse"):
        assert 0.1 < near[name] < 10
        assert far[name] / unit == pytest.approx(near[name], rel=1e-5)


@pytest.mark.parametrize("count", [3, 8, 9, 64, 1000])
def test_the_report_shows_windows_from_the_whole_evaluation_but_keeps_few(count: int) -> None:
    series = torch.arange(count + 11.0)[:, None]
    spec = {"mean": [0.0], "scale": [1.0], "outputs": 1, "columns": ["a"], "season": None}
    model = Forecaster(spec, Stack(hidden_size=4)).eval()
    model.log = lambda *args, **kwargs: None
    for _ in range(2):  # an evaluation forgets the one before
        model.on_validation_epoch_start()
        for batch in WindowBatches(series, 10, 2, 7, None):
            model.validation_step(batch, 0)
        model.rmse["val"].reset()
        first = [int(past[0, 0, 0]) for past, _, _ in model._shown]
        assert len(first) <= 2 * SHOWN
        assert len(first) >= min(count, SHOWN)
        assert first == list(range(0, count, max(1, first[-1] // max(1, len(first) - 1))))
        assert sum(v.untyped_storage().nbytes() for shown in model._shown for v in shown) < 4000


def test_models_that_would_see_the_future_are_refused(text: TextData) -> None:
    for make in (lambda s: LanguageModel(text.spec, s), lambda s: Forecaster(SERIES, s)):
        with pytest.raises(InputError, match="bidirectional"):
            make(Stack(bidirectional=True))


def test_a_classifier_of_one_class_is_refused() -> None:
    with pytest.raises(InputError, match=r"at least 2 classes, got \['a'\]"):
        SequenceClassifier({"mean": [0.0], "scale": [1.0], "classes": ["a"]})


@pytest.mark.parametrize(
    ("stack", "words"),
    [(Stack(cell="lstn"), "cell must be one of lstm"), (Stack(backend="jax"), "backend must be")],
)
def test_unknown_names_are_refused(stack: Stack, words: str) -> None:
    with pytest.raises(InputError, match=words):
        stack.build(3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": 0}, "top_k must be a whole number of at least 1, got 0"),
        ({"top_k": -2}, "top_k must be a whole number of at least 1, got -2"),
        ({"temperature": -0.5}, r"temperature must be a number in \[0, inf\), got -0\.5"),
        ({"temperature": math.nan}, r"temperature must be a number in \[0, inf\), got nan"),
        ({"seed": 2**64}, "seed must be a whole number from 0 to 18446744073709551615, got"),
        ({"length": -1}, "length must be a whole number of at least 0, got -1"),
    ],
)
def test_settings_that_cannot_draw_are_refused_before_and_while_drawing(settings: dict, words: str) -> None:
    model = LanguageModel({"vocabulary": "ab"}, Stack(hidden_size=4))
    with pytest.raises(InputError, match=words):
        Sampling(**settings)
    with pytest.raises(InputError, match=words):
        model.generate("a", **settings)
    assert model.training


def test_generating_leaves_every_mode_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel({"vocabulary": "ab"}, Stack(hidden_size=4), dropout=0.5)
    model.dropout.eval()  # as somebody who freezes a part does
    modes = [module.training for module in model.modules()]
    assert model.generate(length=5)[0] == "a"
    assert [module.training for module in model.modules()] == modes
    for prompt in ("", "z", b"a", ["a"], 5):
        with pytest.raises(InputError):
            model.generate(prompt)  # type: ignore[arg-type]
    assert [module.training for module in model.modules()] == modes
    monkeypatch.setattr("fastrnn.training.language.draw", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.generate("a")
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, {"top_k": 1}])
def test_a_model_that_has_diverged_says_so(settings: dict) -> None:
    model = LanguageModel({"vocabulary": "ab"}, Stack(hidden_size=4))
    with torch.no_grad():
        model.head.bias[1] = torch.nan
    with pytest.raises(InputError, match=r"outputs are not finite: .* diverged"):
        model.generate("a", **settings)


@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-40, 1e-4])
def test_a_temperature_near_zero_takes_the_likeliest(temperature: float) -> None:
    model = LanguageModel({"vocabulary": "abcdef"}, Stack(hidden_size=4))
    with torch.no_grad():
        model.head.bias[2] += 20
    assert model.generate("a", 5, temperature=temperature) == "accccc"


def test_comparison_with_torch_leaves_the_task_alone(text: TextData) -> None:
    model = language_model(text)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = compare_backends(model, text.batches("train", 0, 1).batch(0, 0), rounds=2)
    assert all(v > 0 for v in found.values())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_adding_problem_is_solved_over_30_steps(tmp_path: Path, cell: str) -> None:
    """Chance is a mean squared error of 0.167; docs/results.md has the run over 200 steps."""
    torch.manual_seed(0)
    data = MemoryData("adding", length=30, batch_size=64, epoch=500, evaluation=4)
    model = Forecaster(data.spec, Stack(cell=cell, hidden_size=32), Optim(lr=0.01))
    run = trainer(tmp_path, GradientClipping(norm=1.0), max_epochs=1)
    run.fit(model, datamodule=data)
    assert float(run.logged_metrics["val/rmse"]) ** 2 < 0.02
