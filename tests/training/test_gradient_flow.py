"""Gradients through time are exact, do not disturb training, and are put into words."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import language_model, trainer
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn.training import GradientFlow, TextData, state_gradients
from fastrnn.training.gradient_flow import describe, reach

T, B, I, H = 7, 3, 4, 5
LIBRARIES = {"torch": nn, "fastrnn": fastrnn}


@pytest.mark.parametrize("library", LIBRARIES)
def test_lstm_state_gradients_match_a_loop_over_cells(library: str) -> None:
    rnn = LIBRARIES[library].LSTM(I, H, 1)
    x = torch.randn(T, B, I)
    found = state_gradients(rnn, lambda: {"loss": rnn(x)[0].square().sum()})["loss"]

    cell = nn.LSTMCell(I, H)
    with torch.no_grad():
        for name, p in cell.named_parameters():
            p.copy_(getattr(rnn, f"{name}_l0"))
    h, c, states = torch.zeros(B, H), torch.zeros(B, H), []
    for t in range(T):
        h, c = cell(x[t], (h, c))
        states.append((h, c))
    loss = torch.stack([h for h, _ in states]).square().sum()
    for i, kind in enumerate("hc"):
        flat = [s[i] for s in states]
        grads = torch.autograd.grad(loss, flat, retain_graph=True, allow_unused=True, materialize_grads=True)
        wanted = torch.stack([g.norm() for g in grads]).flip(0)
        torch.testing.assert_close(found[f"{kind} layer 1"], wanted)


def test_gradients_of_c_with_a_projection_match_the_formulas() -> None:
    rnn = nn.LSTM(I, H, proj_size=2).double()
    x = torch.randn(T, B, I).double()
    found = state_gradients(rnn, lambda: {"loss": rnn(x)[0].square().sum()})["loss"]
    h, c, states, outputs = x.new_zeros(B, 2), x.new_zeros(B, H), [], []
    for t in range(T):
        gates = x[t] @ rnn.weight_ih_l0.T + rnn.bias_ih_l0 + h @ rnn.weight_hh_l0.T + rnn.bias_hh_l0
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = (o.sigmoid() * c.tanh()) @ rnn.weight_hr_l0.T
        states.append(c)
        outputs.append(h)
    grads = torch.autograd.grad(torch.stack(outputs).square().sum(), states)
    wanted = torch.stack([g.norm() for g in grads]).flip(0).float()
    torch.testing.assert_close(found["c layer 1"], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_recorded_module_computes_the_same(
    library: str, cell: str, bidirectional: bool, packed: bool
) -> None:
    rnn = getattr(LIBRARIES[library], cell)(I, H, 2, bidirectional=bidirectional)
    x = torch.randn(T, B, I)
    hx = torch.randn(2 * (1 + bidirectional), B, H)
    state = (hx, hx.flip(0)) if cell == "LSTM" else hx
    lengths = torch.tensor([3, 7, 5])

    def run() -> torch.Tensor:
        given = pack_padded_sequence(x, lengths, enforce_sorted=False) if packed else x
        y, last = rnn(given, state)
        y = pad_packed_sequence(y)[0] if packed else y
        parts = last if isinstance(last, tuple) else (last,)
        return torch.cat([y.flatten(), *(p.flatten() for p in parts)])

    inside = []

    def losses() -> dict[str, torch.Tensor]:
        inside.append(run())
        return {"loss": inside[0].square().sum()}

    state_gradients(rnn, losses)
    torch.testing.assert_close(inside[0], run(), atol=1e-5, rtol=1e-5)


def test_ragged_rows_are_lined_up_by_their_ends() -> None:
    rnn = nn.RNN(I, H)
    x, lengths = torch.randn(T, 2, I), torch.tensor([2, 7])

    def loss(rows: list[int]) -> dict[str, torch.Tensor]:
        packed = pack_padded_sequence(x[:, rows], lengths[rows], enforce_sorted=False)
        return {"loss": rnn(packed)[1].sum()}

    both = state_gradients(rnn, lambda: loss([0, 1]))["loss"]["h layer 1"]
    each = [state_gradients(rnn, lambda r=r: loss([r]))["loss"]["h layer 1"] for r in (0, 1)]
    short = torch.cat([each[0][:2], torch.zeros(T - 2)])
    torch.testing.assert_close(both, (short.square() + each[1].square()).sqrt())


def test_a_forgetful_network_vanishes_and_an_eager_one_explodes() -> None:
    rnn, x = nn.RNN(1, 8, nonlinearity="relu"), torch.rand(40, 2, 1)
    with torch.no_grad():
        for scale, word in ((0.5, "vanish"), (1.5, "explode")):
            rnn.weight_hh_l0.copy_(scale * torch.eye(8))
            rnn.weight_ih_l0.fill_(1.0)
            rnn.bias_ih_l0.zero_()
            rnn.bias_hh_l0.zero_()
            found = state_gradients(rnn, lambda: {"loss": rnn(x)[0][-1].sum()})
            profile = found["loss"]["h layer 1"].numpy()
            assert word in describe(profile)
            np.testing.assert_allclose(profile[1:] / profile[:-1], scale, rtol=1e-4)
    assert reach(0.5 ** np.arange(40.0)) == 7  # 0.5^6 = 0.0156 is the last above 0.01


def test_recording_changes_nothing_in_training_and_is_cheap_to_keep(text: TextData, tmp_path: Path) -> None:
    weights = []
    for callbacks in ([], [GradientFlow(every_n_steps=3, budget=10.0)]):
        model = language_model(text)
        run = trainer(tmp_path, *callbacks, max_steps=7)
        run.fit(model, datamodule=text)
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    flow = callbacks[0]
    assert [r["step"] for r in flow.records] == [0, 3, 6]
    assert len(flow.records[0]["norms"]["last step"]["h layer 2"]) == 16
    assert flow.records[0]["parameters"].keys() == dict(model.named_parameters()).keys()
    assert "gradients" in flow.verdict().lower()
    assert len(list(flow.figures())) == 2 * (4 + 1) + 1


def test_recording_keeps_to_its_budget(text: TextData, tmp_path: Path) -> None:
    flow = GradientFlow(every_n_steps=1, budget=0.5)
    trainer(tmp_path, flow, max_steps=70).fit(language_model(text), datamodule=text)
    assert 1 < len(flow.records) < 70
    assert flow.cost < 0.6  # the last one may cost more than the one before it
