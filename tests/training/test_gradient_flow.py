"""Gradients through time are exact, do not disturb training, and are put into words."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import language_model, trainer
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn.training import Forecaster, GradientFlow, MemoryData, Stack, StateGradientNorms, TextData
from fastrnn.training.gradient_flow import describe, reach

T, B, I, H = 7, 3, 4, 5


def heard(rnn: nn.Module, loss: Any) -> dict[str, Tensor]:
    with StateGradientNorms(rnn) as norms:
        loss().backward()
        return norms.take()


def lstm_states(rnn: nn.LSTM, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Every h_t and c_t [B, *] of a one-layer LSTM on x [T, B, I], by the formulas."""
    h, c, states = x.new_zeros(x.shape[1], rnn.proj_size or H), x.new_zeros(x.shape[1], H), []
    for x_t in x:
        gates = x_t @ rnn.weight_ih_l0.T + rnn.bias_ih_l0 + h @ rnn.weight_hh_l0.T + rnn.bias_hh_l0
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        h = h @ rnn.weight_hr_l0.T if rnn.proj_size else h
        states.append((h, c))
    hs, cs = zip(*states, strict=True)
    return list(hs), list(cs)


@pytest.mark.parametrize("proj_size", [0, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_norms_of_every_step_match_autograd_through_the_formulas(proj_size: int, packed: bool) -> None:
    rnn, x = fastrnn.LSTM(I, H, proj_size=proj_size), torch.randn(T, B, I)
    lengths = [3, 7, 5] if packed else [T] * B
    given = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False) if packed else x
    data = (lambda y: y.data) if packed else lambda y: y
    found = heard(rnn, lambda: data(rnn(given)[0]).square().sum())

    squares = torch.zeros(2, T)
    for b, length in enumerate(lengths):
        hs, cs = lstm_states(rnn, x[:length, b : b + 1])
        loss = torch.stack(hs).square().sum()
        for i, states in enumerate((hs, cs)):
            grads = torch.autograd.grad(loss, states, retain_graph=True)
            squares[i, :length] += torch.stack([g.square().sum() for g in reversed(grads)])
    torch.testing.assert_close(found["h layer 1"], squares[0].sqrt())
    torch.testing.assert_close(found["c layer 1"], squares[1].sqrt())


def test_calls_that_follow_one_another_are_one_profile() -> None:
    rnn, x = fastrnn.GRU(I, H, 2), torch.randn(T, B, I)

    def in_parts() -> Tensor:
        first, state = rnn(x[:4])
        second, state = rnn(x[4:6], state)
        return first.sum() + second.square().sum() + rnn(x[6:], state)[0].sum()

    def at_once() -> Tensor:
        y, _ = rnn(x)
        return y[:4].sum() + y[4:6].square().sum() + y[6:].sum()

    parts, whole = heard(rnn, in_parts), heard(rnn, at_once)
    assert list(whole) == ["h layer 1", "h layer 2"]
    for key, norms in whole.items():
        torch.testing.assert_close(parts[key], norms)


def test_a_reverse_direction_is_counted_back_from_its_first_step() -> None:
    rnn, x = fastrnn.RNN(I, H, bidirectional=True), torch.randn(T, B, I)
    with torch.no_grad():
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(rnn, f"{name}_l0_reverse").copy_(getattr(rnn, f"{name}_l0"))
    both = torch.cat([x, x.flip(0)], 1)  # each direction sees what the other one sees of another row
    found = heard(rnn, lambda: rnn(both)[1].square().sum())
    torch.testing.assert_close(found["h layer 1"], found["h layer 1 reverse"])


@pytest.mark.usefixtures("without_16_bit_kernels")
def test_only_layers_with_kernels_are_heard() -> None:
    x = torch.randn(T, B, I)
    for rnn in (nn.LSTM(I, H), fastrnn.LSTM(I, H).bfloat16()):
        assert not heard(rnn, lambda rnn=rnn: rnn(x.to(rnn.weight_hh_l0.dtype))[0].sum())


def test_a_forgetful_network_vanishes_and_an_eager_one_explodes() -> None:
    rnn, x = fastrnn.RNN(1, 8, nonlinearity="relu"), torch.rand(40, 2, 1)
    for scale, word in ((0.5, "vanish"), (1.5, "explode")):
        with torch.no_grad():
            rnn.weight_hh_l0.copy_(scale * torch.eye(8))
            rnn.weight_ih_l0.fill_(1.0)
            rnn.bias_ih_l0.zero_()
            rnn.bias_hh_l0.zero_()
        profile = heard(rnn, lambda: rnn(x)[0][-1].sum())["h layer 1"].numpy()
        assert word in describe(profile)
        np.testing.assert_allclose(profile[1:] / profile[:-1], scale, rtol=1e-4)
    assert reach(0.5 ** np.arange(40.0)) == 7  # 0.5^6 = 0.0156 is the last above 0.01


def test_recording_changes_nothing_in_training(text: TextData, tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [GradientFlow(every_n_steps=3)]):
        model = language_model(text)
        run = trainer(tmp_path, *callbacks, max_steps=7)
        run.fit(model, datamodule=text)
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    flow = callbacks[0]
    assert [r["step"] for r in flow.records] == [0, 3, 6]
    assert list(flow.records[0]["norms"]) == ["last step", "loss"]
    assert len(flow.records[0]["norms"]["last step"]["h layer 2"]) == 16
    assert flow.records[0]["parameters"].keys() == dict(model.named_parameters()).keys()
    assert "gradients" in flow.verdict().lower()
    assert len(list(flow.figures())) == 2 * (4 + 1) + 1


def test_records_are_of_the_training_step_itself(tmp_path: Path) -> None:
    data = MemoryData("adding", length=12, batch_size=4, epoch=1)
    model = Forecaster(data.spec, Stack(hidden_size=H))
    batch = data.batches("train", 0, 1).batch(0, 0)
    wanted = heard(model, lambda: model.loss_of(batch))
    flow = GradientFlow()
    trainer(tmp_path, flow, max_steps=1).fit(model, datamodule=data)
    found = flow.records[0]["norms"]["loss"]
    assert found.keys() == wanted.keys()
    for key, norms in wanted.items():
        torch.testing.assert_close(torch.tensor(found[key]), norms)


def test_a_test_of_an_early_checkpoint_leaves_the_records_alone(text: TextData, tmp_path: Path) -> None:
    flow = GradientFlow(every_n_steps=2)
    run = trainer(tmp_path, flow, max_steps=3)
    model = language_model(text)
    run.fit(model, datamodule=text)
    run.save_checkpoint(tmp_path / "early.ckpt")
    run.fit_loop.epoch_loop.max_steps = 5
    run.fit(model, datamodule=text, ckpt_path=tmp_path / "early.ckpt")
    run.test(model, datamodule=text, ckpt_path=tmp_path / "early.ckpt")
    assert [r["step"] for r in flow.records] == [0, 2, 4]


def test_a_torch_stack_has_parameter_norms_alone(text: TextData, tmp_path: Path) -> None:
    flow = GradientFlow()
    trainer(tmp_path, flow, max_steps=1).fit(language_model(text, "torch"), datamodule=text)
    assert flow.records[0]["parameters"]
    assert "No layer ran on fastrnn's kernels" in flow.verdict()
    assert len(list(flow.figures())) == 1
