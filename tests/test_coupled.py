"""``coupled=True`` against a loop in float64 written from the paper: Greff et al. (2017), CIFG, i = 1 - f."""

import copy
import pickle
from functools import partial

import pytest
import torch
from test_options import (
    STACKED,
    STACKS,
    B,
    H,
    I,
    T,
    assert_same_with_gradients,
    first,
    flat,
    initial,
    make,
    make_input,
    peephole_lstm,
)  # fmt: skip
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import functional


def step(x, h, c, p):
    """x [I], h [P], c [H]; p is what state_dict() has of one direction, by name without its suffix."""
    gates = p["weight_ih"] @ x + p["weight_hh"] @ h
    if "bias_ih" in p:
        gates = gates + p["bias_ih"] + p["bias_hh"]
    f, g, o = gates.reshape(3, -1)
    f = torch.sigmoid(f)
    c = f * c + (1 - f) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return p["weight_hr"] @ h if "weight_hr" in p else h, c


loop = partial(peephole_lstm, step=step)


@pytest.fixture(params=STACKS, ids=str)
def lstm(request):
    return make("LSTM", coupled=True, **request.param)


def test_layers_follow_the_paper_with_gradients(lstm):
    x, hx = make_input("LSTM").requires_grad_(), initial(lstm)
    wanted = [x, *hx, *lstm.parameters()]
    assert_same_with_gradients(flat(lstm(x, hx)), loop(lstm, x, hx)[:3], wanted)
    lstm.batch_first = True
    y, h_n, c_n = loop(lstm, x)[:3]
    torch.testing.assert_close(flat(lstm(x.transpose(0, 1))), [y.transpose(0, 1), h_n, c_n])
    torch.testing.assert_close(flat(lstm(x[:, 1])), [y[:, 1], h_n[:, 1], c_n[:, 1]])


def test_lengths_resets_every_state_and_packed_sequences_follow_the_paper(lstm):
    x, hx, lengths, reset = make_input("LSTM"), initial(lstm), torch.tensor([2, 5, 1]), torch.rand(T, B) < 0.4
    y, _, _, all_h, all_c = loop(lstm, x, hx, lengths, reset)
    found = flat(lstm(x, hx, lengths=lengths, reset=reset, return_states=True))
    assert_same_with_gradients(found, (y, all_h, all_c), [*hx, *lstm.parameters()])
    packed, hidden = lstm(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
    found = [pad_packed_sequence(packed)[0], *hidden]
    assert_same_with_gradients(found, loop(lstm, x, hx, lengths)[:3], [*hx, *lstm.parameters()])


@pytest.mark.parametrize("bias", [True, False])
def test_a_cell_follows_the_paper(bias):
    cell, x = make("LSTMCell", coupled=True, bias=bias), make_input("LSTMCell").requires_grad_()
    hx = tuple(torch.randn(B, H, dtype=torch.float64, requires_grad=True) for _ in "hc")
    rows = [step(x[b], hx[0][b], hx[1][b], dict(cell.named_parameters())) for b in range(B)]
    expected = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    assert_same_with_gradients(cell(x, hx), expected, [x, *hx, *cell.parameters()])


@pytest.mark.filterwarnings("ignore:fastrnn")
@pytest.mark.usefixtures("without_16_bit_kernels")
def test_it_runs_without_kernels_too():
    for kind in ("LSTM", "LSTMCell"):
        module, x = make(kind, torch.bfloat16, coupled=True), make_input(kind, torch.bfloat16)
        expected = copy.deepcopy(module).double()(x.double())
        torch.testing.assert_close(module(x), expected, atol=0.03, rtol=0.03, check_dtype=False)


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_parameters_have_three_gates_and_travel(kind):
    options = STACKED.get(kind, {})
    module, x, plain = (
        make(kind, coupled=True, **options),
        make_input(kind),
        getattr(nn, kind)(I, H, **options),
    )
    for (name, p), (same, of_torch) in zip(module.named_parameters(), plain.named_parameters(), strict=True):
        rows = len(of_torch) if "weight_hr" in name else 3 * H
        assert (name, p.shape) == (same, (rows, *of_torch.shape[1:]))
        assert 0 < p.abs().max() <= H**-0.5
    other = make(kind, coupled=True, **options)
    other.load_state_dict(module.state_dict())
    for twin in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(twin(x), module(x), atol=0, rtol=0)
    assert "coupled=True" in repr(module)
    with pytest.warns(UserWarning, match=r"torch.nn has no coupled=True"):
        assert type(fastrnn.to_torch(module)) is type(module)
    with torch.no_grad():
        torch.testing.assert_close(fastrnn.prepack(module.eval())(x), other(x))
    assert all("prepacked" in layer.forward for layer in fastrnn.explain(module, x))


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_initialisations_find_the_forget_gate(kind):
    module = make(kind, coupled=True, forget_bias=2.0, **STACKED.get(kind, {}))
    for name, p in module.named_parameters():
        if name.startswith("bias"):
            assert (p[:H] == (2 if "_ih" in name else 0)).all()
            assert (p[H:] != 0).all()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fastrnn.init.chrono_(module, 20)
    for name, p in module.named_parameters():
        if "bias_ih" in name:
            assert (p[:H] >= 0).all()
            assert (p[:H].exp() <= 19).all()
        assert torch.equal(p[H:], before[name][H:])


def test_gradients_of_each_sample_and_compiled_whole():
    module = make("LSTM", coupled=True)
    x = torch.stack([make_input("LSTM") for _ in range(3)])

    def loss(parameters, x):
        return first(functional_call(module, parameters, (x,))).square().sum()

    parameters = {name: p.detach() for name, p in module.named_parameters()}
    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, one in enumerate(x):
        torch.testing.assert_close({n: g[i] for n, g in found.items()}, grad(loss)(parameters, one))
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    wanted = list(module.parameters())
    gradients = [torch.autograd.grad(first(f(x[0])).square().sum(), wanted) for f in (module, compiled)]
    torch.testing.assert_close(*gradients)


def test_functional_forms_take_three_gates():
    lstm, x = make("LSTM", coupled=True, proj_size=2), make_input("LSTM")
    hx = tuple(t.detach() for t in initial(lstm))
    params = list(lstm.parameters())
    found = functional.lstm_coupled(x, hx, params, True, 1, 0.0, False, False, False)
    torch.testing.assert_close(list(found), flat(lstm(x, hx)))
    cell, hx = make("LSTMCell", coupled=True), tuple(torch.randn(B, H, dtype=torch.float64) for _ in "hc")
    torch.testing.assert_close(functional.lstm_coupled_cell(x[0], hx, *cell.parameters()), cell(x[0], hx))
