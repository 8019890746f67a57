"""``LayerNormGRU``, its cell, and ``GRU(layer_norm=True)``, against float64 loops written from the papers."""

import copy
import pickle

import pytest
import torch
from test_options import assert_same_with_gradients, peephole_lstm
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn

T, B, I, H = 5, 3, 3, 4


def make(kind="LayerNormGRU", dtype=torch.float64, **options):
    """With gains that differ from one another, and shifts from zero."""
    module = getattr(fastrnn, kind)(I, H, dtype=dtype, **options)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.7)
    return module


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def whole(w, heads):
    return torch.cat([torch.block_diag(*gate.split(H // heads)) for gate in w.split(H)])


def dreamers(module):
    """Hafner et al. (2020): one step of one row."""

    def n(v):
        v = v - v.mean() if module.norm == "layer" else v
        return v / torch.sqrt((v * v).mean() + module.eps)

    def step(x, h, c, p):
        heads = module._fused_options.get("heads", 1)
        v = p["weight_ih"] @ x + whole(p["weight_hh"], heads) @ h + p.get("bias", 0.0)
        r, candidate, u = (p["gain"] * n(v) + p["shift"]).split(H)
        u = torch.sigmoid(u - 1)
        return u * torch.tanh(torch.sigmoid(r) * candidate) + (1 - u) * h, c

    return step


def normed_gru(module):
    """Ba et al. (2016) on torch.nn.GRU: each product by itself."""

    def step(x, h, c, p):
        of_x, of_h = (nn.functional.layer_norm(v, v.shape) for v in (p["weight_ih"] @ x, p["weight_hh"] @ h))
        xr, xz, xn = (p["gain_ih"] * of_x + p.get("bias_ih", 0.0)).split(H)
        hr, hz, hn = (p["gain_hh"] * of_h + p.get("bias_hh", 0.0)).split(H)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        return (1 - z) * torch.tanh(xn + r * hn) + z * h, c

    return step


def step_of(module):
    return dreamers(module) if hasattr(module, "norm") else normed_gru(module)


def loop(module, x, h_0=None, lengths=None, reset=None):
    """(y [T, B, D*H], h_n [L*D, B, H], every h [T, L*D, B, H]), zeros in padding."""
    hx = None if h_0 is None else (h_0, torch.zeros_like(h_0))
    y, h_n, _, every, _ = peephole_lstm(module, x, hx, lengths, reset, step_of(module))
    return y, h_n, every


STACKS = [
    ("LayerNormGRU", {}),
    ("LayerNormGRU", {"norm": "rms", "bias": True, "eps": 0.1}),
    ("LayerNormGRU", {"bias": True, "num_layers": 2, "bidirectional": True, "eps": 1e-3}),
    ("LayerNormGRU", {"norm": "rms", "heads": 2, "memory": 2, "num_layers": 2}),
    ("GRU", {"layer_norm": True}),
    ("GRU", {"layer_norm": True, "bias": False, "memory": 2}),
    ("GRU", {"layer_norm": True, "num_layers": 2, "bidirectional": True}),
]


@pytest.fixture(params=STACKS, ids=str)
def gru(request):
    kind, options = request.param
    return make(kind, **options)


def inputs(gru):
    LD = gru.num_layers * (2 if gru.bidirectional else 1)
    return randn(T, B, I), randn(LD, B, H)


# ---- The formulas ----------------------------------------------------------------------------------------


def test_it_follows_the_paper_in_every_form(gru):
    x, h_0 = inputs(gru)
    lengths, reset, wanted = torch.tensor([2, 5, 0]), torch.rand(T, B) < 0.4, [x, h_0, *gru.parameters()]
    assert_same_with_gradients(gru(x, h_0), loop(gru, x, h_0)[:2], wanted)
    y, h_n, every = loop(gru, x, h_0, lengths, reset)
    assert_same_with_gradients(gru(x, h_0, lengths, reset), (y, h_n), wanted)
    assert_same_with_gradients(gru(x, h_0, lengths, reset, True), (y, every), wanted)
    lengths = torch.tensor([2, 5, 1])
    packed, h_n = gru(pack_padded_sequence(x, lengths, enforce_sorted=False), h_0)
    assert_same_with_gradients((pad_packed_sequence(packed)[0], h_n), loop(gru, x, h_0, lengths)[:2], wanted)
    torch.testing.assert_close(gru(x[:, 1])[0], loop(gru, x)[0][:, 1])
    gru.batch_first = True
    torch.testing.assert_close(gru(x.transpose(0, 1), h_0)[0].transpose(0, 1), loop(gru, x, h_0)[0])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LayerNormGRUCell", {}),
        ("LayerNormGRUCell", {"norm": "rms", "bias": True, "eps": 0.1, "heads": 2}),
        ("GRUCell", {"layer_norm": True}),
        ("GRUCell", {"layer_norm": True, "bias": False}),
    ],
    ids=str,
)
def test_a_cell_is_one_step(kind, options):
    cell, x, h = make(kind, **options), randn(B, I), randn(B, H)
    p = dict(cell.named_parameters())
    expected = [torch.stack([step_of(cell)(x[b], h[b], None, p)[0] for b in range(B)])]
    assert_same_with_gradients([cell(x, h)], expected, [x, h, *cell.parameters()])
    torch.testing.assert_close(cell(x[0], h[0]), expected[0][0])
    torch.testing.assert_close(cell(x), cell(x, torch.zeros_like(h)))
    torch.testing.assert_close(pickle.loads(pickle.dumps(cell))(x, h), expected[0])


def test_padding_reaches_no_gradient(gru):
    x, lengths = torch.randn(T, B, I, dtype=torch.float64), torch.tensor([2, 5, 3])
    expected = torch.autograd.grad(gru(x, lengths=lengths)[0].sum(), gru.parameters())
    x[2:, 0] = torch.nan
    found = torch.autograd.grad(gru(x, lengths=lengths)[0].sum(), gru.parameters())
    torch.testing.assert_close(found, expected)


def test_units_beyond_a_vector_are_normalised_together():
    """In float32, from gates far from zero with little variance."""
    wide = fastrnn.LayerNormGRU(I, 77, bias=True, eps=1e-3)
    nn.init.constant_(wide.bias_l0, 30.0)
    x = torch.randn(T, B, I)
    torch.testing.assert_close(wide(x)[0].double(), wide.double()(x.double())[0], rtol=1e-3, atol=1e-3)
    h = torch.zeros(B, 77, dtype=torch.float64)
    for x_t in x.double():
        v = x_t @ wide.weight_ih_l0.T + h @ wide.weight_hh_l0.T + wide.bias_l0
        r, c, u = nn.functional.layer_norm(v, v.shape[1:], eps=1e-3).chunk(3, -1)
        u = torch.sigmoid(u - 1)
        h = u * torch.tanh(torch.sigmoid(r) * c) + (1 - u) * h
    torch.testing.assert_close(wide(x.double())[1][0], h)


# ---- Derivatives and transforms --------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), [STACKS[1], STACKS[2], STACKS[4]], ids=str)
def test_derivatives_of_first_and_second_order_and_forward_mode(kind, options):
    gru = getattr(fastrnn, kind)(2, 2, dtype=torch.float64, **options)
    names = [name for name, _ in gru.named_parameters()]

    def function(x, *parameters):
        return functional_call(gru, dict(zip(names, parameters, strict=True)), (x,))

    arguments = [randn(2, 2, 2), *gru.parameters()]
    assert torch.autograd.gradcheck(function, arguments, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated")
@pytest.mark.parametrize(("kind", "options"), [STACKS[1], STACKS[3], STACKS[4]], ids=str)
def test_vmap_gradients_of_each_sample_and_graphs(kind, options):
    gru, x = make(kind, **options), torch.randn(2, T, B, I, dtype=torch.float64)
    torch.testing.assert_close(vmap(lambda x: gru(x)[0])(x), torch.stack([gru(one)[0] for one in x]))

    def loss(parameters, x):
        return functional_call(gru, parameters, (x,))[0].square().sum()

    parameters = {name: p.detach() for name, p in gru.named_parameters()}
    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    expected = torch.autograd.grad(loss(dict(gru.named_parameters()), x[1]), list(gru.parameters()))
    torch.testing.assert_close(tuple(g[1] for g in found.values()), expected)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        y = torch.compile(gru, fullgraph=True, backend="aot_eager")(x[1])[0]
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), list(gru.parameters())), expected)
    gru.eval()
    torch.testing.assert_close(torch.export.export(gru, (x[0],)).module()(x[0]), gru(x[0]))
    traced = torch.jit.trace(gru, (x[0],), check_trace=False)
    torch.testing.assert_close(traced(x[0]), gru(x[0]))


@pytest.mark.filterwarnings("ignore:fastrnn")
@pytest.mark.usefixtures("without_16_bit_kernels")
def test_it_runs_without_kernels_too(gru):
    low = copy.deepcopy(gru).bfloat16()
    x, lengths = torch.randn(T, B, I).bfloat16(), torch.tensor([2, 5, 0])
    exact = copy.deepcopy(low).double()(x.double(), lengths=lengths)
    torch.testing.assert_close(low(x, lengths=lengths), exact, atol=0.1, rtol=0.1, check_dtype=False)
    (found, *_) = fastrnn.explain(low, x)
    assert found.operator is None


@pytest.mark.filterwarnings("ignore:fastrnn.*no kernel yet")
def test_recurrent_dropout_of_a_normalised_gru_is_refused_by_name():
    with pytest.raises(ValueError, match="recurrent_dropout"):
        make("GRU", layer_norm=True, recurrent_dropout=0.5)


# ---- Parameters ------------------------------------------------------------------------------------------


def test_parameters_have_the_names_and_values_of_the_documentation():
    gru = fastrnn.LayerNormGRU(I, H, 2, bias=True, heads=2)
    shapes = {name: tuple(p.shape) for name, p in gru.state_dict().items()}
    of_layer = {"weight_hh": (3 * H, H // 2), "bias": (3 * H,), "gain": (3 * H,), "shift": (3 * H,)}
    assert shapes == {
        f"{name}_l{k}": shape
        for k in range(2)
        for name, shape in {"weight_ih": (3 * H, H if k else I), **of_layer}.items()
    }
    cell = fastrnn.LayerNormGRUCell(I, H)
    assert {n: tuple(p.shape) for n, p in cell.state_dict().items()} == {
        "weight_ih": (3 * H, I), "weight_hh": (3 * H, H), "gain": (3 * H,), "shift": (3 * H,),
    }  # fmt: skip
    for module in (gru, cell, fastrnn.GRU(I, H, layer_norm=True), fastrnn.GRUCell(I, H, layer_norm=True)):
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        module.reset_parameters()
        for name, parameter in module.named_parameters():
            if name.startswith(("gain", "shift")):
                assert torch.equal(parameter, torch.full_like(parameter, name.startswith("gain")))
            else:
                assert 0 < parameter.abs().max() <= H**-0.5
    assert repr(fastrnn.LayerNormGRU(I, H, bias=True, norm="rms", heads=2)) == (
        "LayerNormGRU(3, 4, heads=2, norm=rms)"
    )
    assert (
        repr(fastrnn.LayerNormGRUCell(I, H, True, eps=1e-3)) == "LayerNormGRUCell(3, 4, bias=True, eps=0.001)"
    )


def test_copies_and_state_dicts_carry_it(gru):
    x, h_0 = inputs(gru)
    other = copy.deepcopy(gru)
    other.reset_parameters()
    other.load_state_dict(gru.state_dict())
    for twin in (other, copy.deepcopy(gru), pickle.loads(pickle.dumps(gru))):
        torch.testing.assert_close(twin(x, h_0), gru(x, h_0), atol=0, rtol=0)
        for p in twin.parameters():
            p.data.mul_(2)
        assert not torch.equal(twin(x)[0], gru(x)[0])
    torch.testing.assert_close(gru.float()(x.float())[0].double(), gru.double()(x)[0], rtol=1e-4, atol=1e-5)


def test_prepacked_weights_serve_it_until_one_changes():
    gru, x = make(dtype=torch.float32).eval(), torch.randn(T, B, I)
    with torch.no_grad():
        expected = gru(x)[0]
        fastrnn.prepack(gru)
        torch.testing.assert_close(gru(x)[0], expected)
        gru.gain_l0.mul_(2)
        with pytest.warns(UserWarning, match="weights have changed"):
            changed = gru(x)[0]
    assert not torch.allclose(changed, expected)
    cell = make("LayerNormGRUCell", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = cell(x[0])
        torch.testing.assert_close(fastrnn.prepack(cell)(x[0]), expected)
    assert "prepacked" in fastrnn.explain(cell, x[0])[0].forward


def test_conversions_leave_it_and_say_so():
    model = nn.ModuleList([make(), make("LayerNormGRUCell")])
    fastrnn.convert(model)
    with pytest.warns(
        UserWarning, match=r"0 \(torch.nn has no LayerNormGRU\), 1 \(torch.nn has no LayerNormGRUCell\)"
    ):
        fastrnn.to_torch(model)
    assert [type(m).__name__ for m in model] == ["LayerNormGRU", "LayerNormGRUCell"]
    with pytest.warns(UserWarning, match="torch.nn has no layer_norm=True"):
        fastrnn.to_torch(make("GRU", layer_norm=True))
    for module in model:
        with pytest.raises(RuntimeError, match=r"torch\.jit\.script does not take a fastrnn\.LayerNormGRU"):
            torch.jit.script(module)


# ---- Bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LayerNormGRU", "LayerNormGRUCell"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "batch"}, "norm must be 'layer' or 'rms', got 'batch'"),
        ({"eps": 0.0}, r"eps must be a finite number above 0, got 0\.0"),
        ({"eps": float("inf")}, "eps must be a finite number above 0, got inf"),
        ({"heads": 3}, "heads=3 should divide hidden_size=4"),
    ],
)
def test_what_cannot_be_is_refused_by_name_and_value(kind, options, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **options)


def test_sizes_that_do_not_fit_are_refused():
    cell = make("LayerNormGRUCell")
    with pytest.raises(ValueError, match="LayerNormGRUCell: Expected input to be 1D or 2D, got 3D"):
        cell(randn(1, B, I))
    with pytest.raises(RuntimeError, match="input has inconsistent input_size: got 4 expected 3"):
        cell(randn(B, I + 1))
    with pytest.raises(RuntimeError, match="hidden0 has inconsistent hidden_size: got 3, expected 4"):
        cell(randn(B, I), randn(B, H - 1))
    with pytest.raises(ValueError, match="hidden_size must be greater than zero, got 0"):
        fastrnn.LayerNormGRUCell(I, 0)
    with pytest.raises(RuntimeError, match=r"Expected hidden size \(1, 3, 4\), got \[1, 3, 1\]"):
        make()(randn(T, B, I), randn(1, B, 1))
