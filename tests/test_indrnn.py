"""``IndRNN``: Li et al. (2018), against a loop in float64 written from the paper."""

import pytest
import torch
from test_options import assert_same_with_gradients, peephole_lstm
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn

T, B, I, H = 5, 3, 3, 4


def loop(rnn, x, h_0=None, lengths=None, reset=None):
    """(y [T, B, D*H], h_n [L*D, B, H], every h [T, L*D, B, H]), zeros in padding."""
    act = torch.tanh if rnn.nonlinearity == "tanh" else torch.relu

    def step(x, h, c, p):
        a = p["weight_ih"] @ x + p["weight_hh"] * h
        return act(a + p["bias_ih"] if rnn.bias else a), c

    hx = None if h_0 is None else (h_0, torch.zeros_like(h_0))
    y, h_n, _, every, _ = peephole_lstm(rnn, x, hx, lengths, reset, step)
    return y, h_n, every


STACKS = [{}, {"bias": False, "nonlinearity": "relu"}, {"num_layers": 2, "bidirectional": True}]


@pytest.fixture(params=STACKS, ids=str)
def rnn(request):
    return fastrnn.IndRNN(I, H, dtype=torch.float64, **request.param)


def inputs(rnn):
    LD = rnn.num_layers * (2 if rnn.bidirectional else 1)
    x, h_0 = (torch.randn(n, B, w, dtype=torch.float64, requires_grad=True) for n, w in ((T, I), (LD, H)))
    return x, h_0


def assert_same(rnn, found, expected, *wanted):
    assert_same_with_gradients(found, expected, [*wanted, *rnn.parameters()])


def test_it_follows_the_paper_in_every_form(rnn):
    x, h_0 = inputs(rnn)
    lengths, reset = torch.tensor([2, 5, 0]), torch.rand(T, B) < 0.4
    assert_same(rnn, rnn(x, h_0), loop(rnn, x, h_0)[:2], x, h_0)
    y, h_n, every = loop(rnn, x, h_0, lengths, reset)
    assert_same(rnn, rnn(x, h_0, lengths, reset), (y, h_n), x, h_0)
    assert_same(rnn, rnn(x, h_0, lengths, reset, True), (y, every), x, h_0)
    packed, h_n = rnn(pack_padded_sequence(x, torch.tensor([2, 5, 1]), enforce_sorted=False), h_0)
    assert_same(
        rnn, (pad_packed_sequence(packed)[0], h_n), loop(rnn, x, h_0, torch.tensor([2, 5, 1]))[:2], x, h_0
    )
    torch.testing.assert_close(rnn(x[:, 1])[0], loop(rnn, x)[0][:, 1])


def test_its_parameters_are_those_of_the_paper():
    rnn = fastrnn.IndRNN(I, H, 2)
    shapes = {name: tuple(p.shape) for name, p in rnn.named_parameters()}
    of_layer = {"weight_hh": (H,), "bias_ih": (H,)}
    assert shapes == {
        f"{name}_l{k}": shape
        for k in range(2)
        for name, shape in {"weight_ih": (H, H if k else I), **of_layer}.items()
    }
    again = fastrnn.IndRNN(I, H, 2)
    again.load_state_dict(rnn.state_dict())
    x = torch.randn(T, B, I)
    assert torch.equal(again(x)[0], rnn(x)[0])


def test_prepacked_weights_serve_it_until_one_changes():
    rnn = fastrnn.IndRNN(I, H).eval()
    x = torch.randn(T, B, I)
    with torch.no_grad():
        expected = rnn(x)[0]
        fastrnn.prepack(rnn)
        torch.testing.assert_close(rnn(x)[0], expected)
        rnn.weight_hh_l0.mul_(2)
        with pytest.warns(UserWarning, match="weights have changed"):
            changed = rnn(x)[0]
    torch.testing.assert_close(changed, loop(rnn, x)[0])


def test_derivatives_of_second_order():
    rnn = fastrnn.IndRNN(I, H, dtype=torch.float64)
    names = [name for name, _ in rnn.named_parameters()]

    def function(x, *weights):
        return torch.func.functional_call(rnn, dict(zip(names, weights, strict=True)), x)[0]

    x = torch.randn(3, 2, I, dtype=torch.float64, requires_grad=True)
    weights = [p.detach().requires_grad_() for p in rnn.parameters()]
    assert torch.autograd.gradcheck(function, (x, *weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, *weights), fast_mode=True)


def test_it_is_left_as_it_is_and_bad_values_are_named():
    rnn = fastrnn.IndRNN(I, H)
    assert fastrnn.convert(rnn) is rnn
    with pytest.warns(UserWarning, match="torch.nn has no IndRNN"):
        fastrnn.to_torch(rnn)
    assert type(rnn) is fastrnn.IndRNN
    with pytest.raises(ValueError, match="nonlinearity must be 'tanh' or 'relu', got 'sin'"):
        fastrnn.IndRNN(I, H, nonlinearity="sin")
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script does not take a fastrnn\.IndRNN"):
        torch.jit.script(rnn)
