"""``layer_norm=True``: Ba et al. (2016), eq. 20-22, against a loop in float64 written from the paper."""

import pytest
import torch
from test_options import (
    B,
    H,
    I,
    T,
    assert_same_with_gradients,
    flat,
    initial,
    make,
    make_input,
    peephole_lstm,
)  # fmt: skip
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn

STACKS = [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True}]


def norm(v):
    return (v - v.mean()) / torch.sqrt(((v - v.mean()) ** 2).mean() + 1e-5)


def step(x, h, c, p):
    """x [I], h and c [H]; p is what state_dict() has of one direction, by name without its suffix."""
    a = p["gain_ih"] * norm(p["weight_ih"] @ x) + p["gain_hh"] * norm(p["weight_hh"] @ h)
    if "bias_ih" in p:
        a = a + p["bias_ih"] + p["bias_hh"]
    i, f, g, o = a.reshape(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(p["gain_c"] * norm(c) + p["shift_c"]), c


def loop(lstm, *args):
    return peephole_lstm(lstm, *args, step=step)


@pytest.fixture(params=STACKS, ids=str)
def lstm(request):
    module = make("LSTM", layer_norm=True, **request.param)
    for parameter in module.parameters():  # gains that differ from one another, and shifts from zero
        torch.nn.init.normal_(parameter, std=0.7)
    return module


def test_it_follows_the_paper_with_gradients_of_each_parameter(lstm):
    x, hx = make_input("LSTM").requires_grad_(), initial(lstm)
    assert_same_with_gradients(flat(lstm(x, hx)), loop(lstm, x, hx)[:3], [x, *hx, *lstm.parameters()])
    y, h_n, c_n = loop(lstm, x)[:3]
    torch.testing.assert_close(flat(lstm(x[:, 1])), [y[:, 1], h_n[:, 1], c_n[:, 1]])


def test_it_follows_the_paper_over_lengths_resets_and_every_state(lstm):
    x, hx = make_input("LSTM"), initial(lstm)
    lengths, reset = torch.tensor([2, 5, 0]), torch.rand(T, B) < 0.4
    y, h_n, c_n, all_h, all_c = loop(lstm, x, hx, lengths, reset)
    wanted = [*hx, *lstm.parameters()]
    assert_same_with_gradients(flat(lstm(x, hx, lengths, reset)), (y, h_n, c_n), wanted)
    found = flat(lstm(x, hx, lengths, reset, return_states=True))
    assert_same_with_gradients(found, (y, all_h, all_c), wanted)


def test_it_follows_the_paper_over_packed_sequences(lstm):
    x, hx, lengths = make_input("LSTM"), initial(lstm), torch.tensor([2, 5, 1])
    packed, hidden = lstm(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
    found = [pad_packed_sequence(packed)[0], *hidden]
    assert_same_with_gradients(found, loop(lstm, x, hx, lengths)[:3], [*hx, *lstm.parameters()])


def test_padding_reaches_no_gradient(lstm):
    x, lengths = make_input("LSTM"), torch.tensor([2, 5, 3])
    expected = torch.autograd.grad(lstm(x, lengths=lengths)[0].sum(), lstm.parameters())
    poisoned = x.clone()
    poisoned[2:, 0] = torch.nan
    found = torch.autograd.grad(lstm(poisoned, lengths=lengths)[0].sum(), lstm.parameters())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bias", [True, False])
def test_a_cell_is_one_step(bias):
    cell = make("LSTMCell", layer_norm=True, bias=bias)
    x, hx = make_input("LSTMCell"), tuple(torch.randn(B, H, dtype=torch.float64) for _ in range(2))
    p = dict(cell.named_parameters())
    expected = [
        torch.stack(part) for part in zip(*(step(x[b], hx[0][b], hx[1][b], p) for b in range(B)), strict=True)
    ]
    assert_same_with_gradients(cell(x, hx), expected, list(cell.parameters()))


def test_gains_are_one_and_shifts_zero_at_first_and_after_a_reset():
    module = make("LSTM", layer_norm=True, num_layers=2)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    module.reset_parameters()
    for name, parameter in module.named_parameters():
        if name.startswith(("gain", "shift")):
            assert torch.equal(parameter, torch.full_like(parameter, name.startswith("gain")))
    assert module.gain_hh_l1.shape == (4 * H,)
    assert module.shift_c_l1.shape == (H,)


def test_prepacked_weights_serve_it_until_one_changes(lstm):
    lstm.float().eval()
    x = make_input("LSTM", torch.float32)
    with torch.no_grad():
        expected = lstm(x)[0]
        fastrnn.prepack(lstm)
        assert torch.equal(lstm(x)[0], expected)
        lstm.gain_hh_l0.mul_(2)
        with pytest.warns(UserWarning, match="weights have changed"):
            changed = lstm(x)[0]
    torch.testing.assert_close(changed, loop(lstm, x)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("without_16_bit_kernels")
def test_it_runs_without_kernels_too():
    lstm = make("LSTM", torch.float32, layer_norm=True)
    x = make_input("LSTM", torch.float32)
    expected = lstm(x)[0]
    fastrnn.functional._warned.clear()
    with pytest.warns(fastrnn.FallbackWarning, match="bfloat16"):
        y = lstm.bfloat16()(x.bfloat16())[0]
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peephole": True}, "peephole=True and layer_norm=True cannot be combined"),
        ({"coupled": True}, "layer_norm=True and coupled=True cannot be combined"),
        ({"proj_size": 2}, "layer_norm=True cannot be combined with proj_size=2"),
        ({"recurrent_dropout": 0.5}, "recurrent_dropout=0.5 cannot be combined with layer_norm=True"),
    ],
)
def test_what_has_no_cell_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        fastrnn.LSTM(I, H, layer_norm=True, **options)


def test_second_derivatives():
    lstm = make("LSTM", layer_norm=True)
    names = [name for name, _ in lstm.named_parameters()]

    def function(x, *weights):
        return torch.func.functional_call(lstm, dict(zip(names, weights, strict=True)), x)[0]

    x = torch.randn(2, 1, I, dtype=torch.float64, requires_grad=True)
    weights = [p.detach().requires_grad_() for p in lstm.parameters()]
    assert torch.autograd.gradcheck(function, (x, *weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, *weights), fast_mode=True)


@pytest.mark.parametrize("bias", [True, False])
def test_second_derivatives_are_the_same_in_every_mode(bias):
    lstm, x = make("LSTM", layer_norm=True, bias=bias), torch.randn(2, 1, I, dtype=torch.float64)
    rev, fwd = torch.func.jacrev, torch.func.jacfwd

    def f(x):
        return lstm(x)[0].square().sum()

    expected = rev(rev(f))(x)
    for outer, inner in ((rev, fwd), (fwd, rev), (fwd, fwd)):
        torch.testing.assert_close(outer(inner(f))(x), expected)
