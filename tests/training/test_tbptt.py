"""Truncated back-propagation through time: chunks, resets and the state carried between them."""

import pytest
import torch
from torch import nn

from fastrnn.training import InputError, StateCarrier, StreamChunks, scan
from fastrnn.training.data.batches import IGNORE

DOCUMENTS = [torch.arange(0, 37), torch.arange(100, 123), torch.arange(200, 261)]


@pytest.mark.parametrize(("k1", "k2"), [(5, None), (5, 5), (3, 8), (1, 4), (40, 40)])
def test_every_symbol_but_a_documents_first_is_a_target_once(k1: int, k2: int | None) -> None:
    chunks = StreamChunks(DOCUMENTS, rows=3, k1=k1, k2=k2)
    seen = torch.cat([b.y[b.y != IGNORE] for b in chunks]).tolist()
    total = sum(map(len, DOCUMENTS)) // 3 * 3
    stream = torch.cat(DOCUMENTS)
    wanted = [int(v) for i, v in enumerate(stream) if 0 < i <= total and v % 100 != 0]
    assert sorted(seen) == sorted(wanted)


@pytest.mark.parametrize(("k1", "k2"), [(5, None), (3, 8)])
def test_targets_follow_inputs_and_documents_begin_with_a_reset(k1: int, k2: int | None) -> None:
    for batch in StreamChunks(DOCUMENTS, rows=3, k1=k1, k2=k2):
        real = batch.y != IGNORE
        assert torch.equal(batch.y[real], batch.x[real] + 1)
        assert batch.reset[batch.x % 100 == 0].all()


def test_rows_begin_with_a_reset_and_run_on_without_one() -> None:
    chunks = list(StreamChunks([torch.arange(1000)], rows=4, k1=10))
    assert chunks[0].reset[0].all()
    assert sum(int(b.reset.sum()) for b in chunks) == 4
    rows = torch.cat([b.x for b in chunks])
    assert torch.equal(rows.diff(dim=0), torch.ones_like(rows[1:]))


def test_processes_share_the_rows() -> None:
    whole = list(StreamChunks(DOCUMENTS, rows=4, k1=7))
    parts = [list(StreamChunks(DOCUMENTS, 4, 7, rank=r, world=2)) for r in range(2)]
    for full, left, right in zip(whole, *parts, strict=True):
        assert torch.equal(full.x, torch.cat([left.x, right.x], dim=1))
        assert left.weight + right.weight == pytest.approx(2.0)


def test_position_is_saved_and_taken_up_again() -> None:
    first = StreamChunks(DOCUMENTS, rows=3, k1=4)
    batches = iter(first)
    for _ in range(3):
        next(batches)
    second = StreamChunks(DOCUMENTS, rows=3, k1=4)
    second.load_state_dict(first.state_dict())
    for a, b in zip(batches, second, strict=True):
        assert torch.equal(a.x, b.x)
    assert torch.equal(next(iter(second)).x, next(iter(first)).x)  # the next epoch is a whole one


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rows": 3, "k1": 5, "k2": 4}, "k1=5, k2=4"),
        ({"rows": 3, "k1": 0}, "k1=0"),
        ({"rows": 500, "k1": 5}, "too short for 500"),
        ({"rows": 3, "k1": 5, "world": 2}, "divisible by the 2 processes, got 3"),
    ],
)
def test_impossible_settings_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        StreamChunks(DOCUMENTS, **settings)


def test_scan_with_a_reset_is_two_runs() -> None:
    rnn = nn.LSTM(3, 5, 2)
    x = torch.randn(9, 4, 3)
    reset = torch.zeros(9, 4, dtype=torch.bool)
    reset[6, 1] = True
    y, _ = scan(rnn, x, None, reset)
    plain, _ = rnn(x)
    again, _ = rnn(x[6:])
    assert torch.allclose(y[:, [0, 2, 3]], plain[:, [0, 2, 3]], atol=1e-6)
    assert torch.allclose(y[:6, 1], plain[:6, 1], atol=1e-6)
    assert torch.allclose(y[6:, 1], again[:, 1], atol=1e-6)


@pytest.mark.parametrize(("k1", "k2"), [(5, 5), (3, 8)])
def test_gradient_goes_back_exactly_k2_steps(k1: int, k2: int) -> None:
    rnn, carrier = nn.GRU(2, 4), StateCarrier()
    stream = torch.randn(31, 1, 2)
    for i, batch in enumerate(StreamChunks([torch.arange(31)], rows=1, k1=k1, k2=k2)):
        x = stream[i * k1 : i * k1 + len(batch.x)].clone().requires_grad_()
        before = carrier.state
        y = carrier(rnn, x, batch.reset, batch.keep)
        assert before is None or not before.requires_grad
        (grad,) = torch.autograd.grad(y[-1].sum(), x)
        assert (grad.abs().sum((1, 2)) > 0).all()
    whole, _ = rnn(stream)  # weights did not change, so the carried states are those of one run
    assert torch.allclose(y[-1], whole[-1], atol=1e-6)
