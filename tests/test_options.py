"""The options that torch.nn does not have, against loops in float64 written from the papers."""

import copy
import inspect
import itertools
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import dropout
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import functional

LAYERS = ["LSTM", "GRU", "RNN"]
CELLS = ["LSTMCell", "GRUCell", "RNNCell"]
T, B, I, H = 5, 3, 3, 4
PEEPHOLES = ("weight_ci", "weight_cf", "weight_co")


def make(kind, dtype=torch.float64, **options):
    return getattr(fastrnn, kind)(I, H, dtype=dtype, **options)


def make_input(kind, dtype=torch.float64):
    return torch.randn(*((B, I) if kind.endswith("Cell") else (T, B, I)), dtype=dtype)


def flat(result):
    y, h = result
    return [y, *h] if isinstance(h, tuple) else [y, h]


def first(result):
    return result[0] if isinstance(result, tuple) else result


# ---- Peepholes: Gers and Schmidhuber (2000), one sequence and one step at a time -----------------------


def peephole_step(x, h, c, p):
    """x [I], h [P], c [H]; p is what state_dict() has of one direction, by name without its suffix."""
    gates = p["weight_ih"] @ x + p["weight_hh"] @ h
    if "bias_ih" in p:
        gates = gates + p["bias_ih"] + p["bias_hh"]
    i, f, g, o = gates.reshape(4, -1)
    i = torch.sigmoid(i + p["weight_ci"] * c)
    f = torch.sigmoid(f + p["weight_cf"] * c)
    c = f * c + i * torch.tanh(g)
    o = torch.sigmoid(o + p["weight_co"] * c)
    h = o * torch.tanh(c)
    return p["weight_hr"] @ h if "weight_hr" in p else h, c


def peephole_lstm(lstm, x, hx=None, lengths=None, reset=None, step=peephole_step):
    """(y [T, B, D*P], h_n, c_n, every h [T, L*D, B, P], every c), time-major and dense, zeros in padding."""
    parameters = dict(lstm.named_parameters())
    ways = ["", "_reverse"] if lstm.bidirectional else [""]
    P = lstm.proj_size or lstm.hidden_size
    lengths = [len(x)] * x.shape[1] if lengths is None else lengths.tolist()
    last_h, last_c, all_h, all_c = [], [], [], []
    for k, way in itertools.product(range(lstm.num_layers), ways):
        suffix = f"_l{k}{way}"
        p = {n.removesuffix(suffix): w for n, w in parameters.items() if n.endswith(suffix)}
        place = len(last_h)
        hs = [[x.new_zeros(P)] * x.shape[1] for _ in x]
        cs = [[x.new_zeros(lstm.hidden_size)] * x.shape[1] for _ in x]
        ends = []
        for b, length in enumerate(lengths):
            h = x.new_zeros(P) if hx is None else hx[0][place, b]
            c = x.new_zeros(lstm.hidden_size) if hx is None else hx[1][place, b]
            for t in reversed(range(length)) if way else range(length):
                if reset is not None and reset[t, b]:
                    h, c = torch.zeros_like(h), torch.zeros_like(c)
                h, c = hs[t][b], cs[t][b] = step(x[t, b], h, c, p)
            ends.append((h, c))
        last_h.append(torch.stack([h for h, _ in ends]))
        last_c.append(torch.stack([c for _, c in ends]))
        all_h.append(torch.stack([torch.stack(step) for step in hs]))
        all_c.append(torch.stack([torch.stack(step) for step in cs]))
        if way == ways[-1]:
            x = torch.cat(all_h[-len(ways) :], -1)
    return x, torch.stack(last_h), torch.stack(last_c), torch.stack(all_h, 1), torch.stack(all_c, 1)


def assert_same_with_gradients(found, expected, wanted):
    torch.testing.assert_close(list(found), list(expected))
    weights = [torch.randn_like(e) for e in expected]
    gradients = [
        torch.autograd.grad(
            sum((o * w).sum() for o, w in zip(out, weights, strict=True)),
            wanted,
            retain_graph=True,
            materialize_grads=True,  # a reset may leave an initial state without use
        )
        for out in (found, expected)
    ]
    torch.testing.assert_close(*gradients)


STACKS = [
    {},
    {"bias": False},
    {"proj_size": 2},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "proj_size": 2, "bias": False},
]


@pytest.fixture(params=STACKS, ids=str)
def lstm(request):
    return make("LSTM", peephole=True, **request.param)


def initial(lstm, B=B):
    LD = lstm.num_layers * (2 if lstm.bidirectional else 1)
    widths = (lstm.proj_size or H, H)
    return tuple(torch.randn(LD, B, w, dtype=torch.float64, requires_grad=True) for w in widths)


def test_peepholes_follow_the_paper_with_gradients_of_each_vector(lstm):
    x, hx = make_input("LSTM").requires_grad_(), initial(lstm)
    wanted = [x, *hx, *lstm.parameters()]
    assert_same_with_gradients(flat(lstm(x, hx)), peephole_lstm(lstm, x, hx)[:3], wanted)
    torch.testing.assert_close(flat(lstm(x)), list(peephole_lstm(lstm, x)[:3]))


def test_peepholes_follow_the_paper_batch_first_and_unbatched(lstm):
    lstm.batch_first = True
    x = make_input("LSTM")
    y, h_n, c_n = peephole_lstm(lstm, x)[:3]
    torch.testing.assert_close(flat(lstm(x.transpose(0, 1))), [y.transpose(0, 1), h_n, c_n])
    torch.testing.assert_close(flat(lstm(x[:, 1])), [y[:, 1], h_n[:, 1], c_n[:, 1]])


def test_peepholes_follow_the_paper_over_lengths_resets_and_every_state(lstm):
    x, hx = make_input("LSTM"), initial(lstm)
    lengths, reset = torch.tensor([2, 5, 0]), torch.rand(T, B) < 0.4
    assert reset.any()
    y, h_n, c_n, all_h, all_c = peephole_lstm(lstm, x, hx, lengths, reset)
    wanted = [*hx, *lstm.parameters()]
    found = flat(lstm(x, hx, lengths=lengths, reset=reset))
    assert_same_with_gradients(found, (y, h_n, c_n), wanted)
    found = flat(lstm(x, hx, lengths=lengths, reset=reset, return_states=True))
    assert_same_with_gradients(found, (y, all_h, all_c), wanted)


def test_peepholes_follow_the_paper_over_packed_sequences(lstm):
    x, hx, lengths = make_input("LSTM"), initial(lstm), torch.tensor([2, 5, 1])
    packed, hidden = lstm(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
    found = [pad_packed_sequence(packed)[0], *hidden]
    expected = peephole_lstm(lstm, x, hx, lengths)[:3]
    assert_same_with_gradients(found, expected, [*hx, *lstm.parameters()])


def test_peepholes_are_those_of_onnx():
    """Somebody else's: the reference evaluator of ONNX's LSTM, whose gates stand in the order i, o, f, g."""
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    inputs = ["x", "w", "r", "b", "", "h", "c", "p"]
    node = onnx.helper.make_node("LSTM", inputs, ["y", "h_n", "c_n"], hidden_size=H)
    value = lambda name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.DOUBLE, None)  # noqa: E731
    graph = onnx.helper.make_graph(
        [node], "lstm", [value(name) for name in inputs if name], [value(name) for name in node.output]
    )
    lstm, x = make("LSTM", peephole=True), make_input("LSTM")
    h, c = (t.detach() for t in initial(lstm))
    p = {name.removesuffix("_l0"): t for name, t in lstm.state_dict().items()}

    def iofg(t):
        return t.view(4, H, -1)[[0, 3, 1, 2]].reshape(1, 4 * H, -1)

    b = torch.cat([iofg(p["bias_ih"]), iofg(p["bias_hh"])], 1).squeeze(-1)
    peepholes = torch.cat([p["weight_ci"], p["weight_co"], p["weight_cf"]]).unsqueeze(0)
    given = {
        "x": x,
        "w": iofg(p["weight_ih"]),
        "r": iofg(p["weight_hh"]),
        "b": b,
        "h": h,
        "c": c,
        "p": peepholes,
    }
    model = onnx.helper.make_model(graph)
    y, h_n, c_n = ReferenceEvaluator(model).run(None, {name: t.numpy() for name, t in given.items()})
    expected = [torch.from_numpy(t) for t in (y[:, 0], h_n, c_n)]
    torch.testing.assert_close(flat(lstm(x, (h, c))), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_a_cell_with_peepholes_follows_the_paper(bias):
    cell = make("LSTMCell", peephole=True, bias=bias)
    p = dict(cell.named_parameters())
    x = make_input("LSTMCell").requires_grad_()
    hx = tuple(torch.randn(B, H, dtype=torch.float64, requires_grad=True) for _ in "hc")
    rows = [peephole_step(x[b], hx[0][b], hx[1][b], p) for b in range(B)]
    expected = [torch.stack(parts) for parts in zip(*rows, strict=True)]
    assert_same_with_gradients(cell(x, hx), expected, [x, *hx, *cell.parameters()])
    torch.testing.assert_close(cell(x[0], (hx[0][0], hx[1][0])), rows[0])
    zero = torch.zeros(H, dtype=torch.float64)
    torch.testing.assert_close(cell(x[0]), peephole_step(x[0], zero, zero, p))


@pytest.mark.filterwarnings("ignore:fastrnn")
@pytest.mark.usefixtures("without_16_bit_kernels")
def test_peepholes_run_without_kernels_too():
    lstm, cell = make("LSTM", peephole=True, bidirectional=True), make("LSTMCell", peephole=True)
    for module in (lstm, cell):  # to numbers that bfloat16 holds
        module.load_state_dict({k: v.bfloat16().double() for k, v in module.state_dict().items()})
    x, lengths = make_input("LSTM").bfloat16(), torch.tensor([2, 5, 0])
    close = {"atol": 0.03, "rtol": 0.03, "check_dtype": False}
    expected = peephole_lstm(lstm, x.double(), lengths=lengths)[:3]
    low = copy.deepcopy(lstm).bfloat16()
    torch.testing.assert_close(flat(low(x, lengths=lengths)), list(expected), **close)
    (found,) = fastrnn.explain(low, x)
    assert found.operator is None
    torch.testing.assert_close(copy.deepcopy(cell).bfloat16()(x[0]), cell(x[0].double()), **close)
    fastrnn.set_strict(True)
    try:
        with pytest.raises(RuntimeError, match="strict mode forbids a path of torch operations"):
            low(x)
    finally:
        fastrnn.set_strict(False)


# ---- Peepholes: parameters ---------------------------------------------------------------------------


def test_peepholes_are_parameters_of_each_layer_and_direction_drawn_as_torch_draws_its_own():
    torch.manual_seed(0)
    plain = nn.LSTM(I, 500, num_layers=2, bidirectional=True)
    torch.manual_seed(0)
    lstm = fastrnn.LSTM(I, 500, num_layers=2, bidirectional=True, peephole=True)
    state = lstm.state_dict()
    for name, weight in plain.state_dict().items():
        assert torch.equal(state.pop(name), weight)
    suffixes = ["_l0", "_l0_reverse", "_l1", "_l1_reverse"]
    assert set(state) == {name + suffix for name in PEEPHOLES for suffix in suffixes}
    bound = 500**-0.5
    for vector in state.values():
        assert vector.shape == (500,)
        assert 0.9 * bound < vector.max() <= bound
        assert -bound <= vector.min() < -0.9 * bound
    drawn = {name: p.detach().clone() for name, p in lstm.named_parameters()}
    torch.manual_seed(0)
    lstm.reset_parameters()
    torch.testing.assert_close(dict(lstm.named_parameters()), drawn)
    assert [name for names in lstm._all_weights for name in names] == lstm._flat_weights_names
    assert set(make("LSTMCell", peephole=True).state_dict()) - set(nn.LSTMCell(I, H).state_dict()) == set(
        PEEPHOLES
    )


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_states_copies_and_pickles_carry_peepholes(kind):
    module, x = make(kind, peephole=True), make_input(kind)
    other = make(kind, peephole=True)
    other.load_state_dict(module.state_dict())
    for twin in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(twin) == repr(module)
        torch.testing.assert_close(twin(x), module(x), atol=0, rtol=0)
        torch.testing.assert_close(copy.deepcopy(twin).float()(x.float()), module(x), check_dtype=False)
        for p in twin.parameters():
            p.data.mul_(2)
        assert not torch.equal(first(twin(x)), first(module(x)))
    with pytest.raises(RuntimeError, match="weight_ci"):
        module.load_state_dict(getattr(nn, kind)(I, H).state_dict())


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_peepholes_are_read_by_name_at_each_call(kind):
    module, x = make(kind, peephole=True), make_input(kind)
    name = "weight_cf" if kind == "LSTMCell" else "weight_cf_l0"
    twin = copy.deepcopy(module)
    other = torch.randn(H, dtype=torch.float64)
    twin.get_parameter(name).data.copy_(other)
    expected = twin(x)
    torch.testing.assert_close(functional_call(module, {name: other}, (x,)), expected)
    replaced = copy.deepcopy(module)
    setattr(replaced, name, nn.Parameter(other))
    torch.testing.assert_close(replaced(x), expected)

    class Doubled(nn.Module):
        def forward(self, w):
            return 2 * w

    halved = copy.deepcopy(module)
    halved.get_parameter(name).data.copy_(other / 2)
    parametrize.register_parametrization(halved, name, Doubled())
    torch.testing.assert_close(halved(x), expected)
    first(halved(x)).sum().backward()
    first(twin(x)).sum().backward()
    found = halved.parametrizations[name].original.grad
    torch.testing.assert_close(found, 2 * twin.get_parameter(name).grad)


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_prepacked_peepholes_give_the_same_until_one_of_them_changes(kind):
    options = {} if kind == "LSTMCell" else {"num_layers": 2, "bidirectional": True, "proj_size": 2}
    module, x = make(kind, peephole=True, **options).eval(), make_input(kind)
    expected = module(x)
    fastrnn.prepack(module)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected)
    assert all("prepacked" in layer.forward for layer in fastrnn.explain(module, x))
    name = "weight_co" if kind == "LSTMCell" else "weight_co_l1_reverse"
    with torch.no_grad():
        module.get_parameter(name).mul_(3)
    twin = make(kind, peephole=True, **options)
    twin.load_state_dict(module.state_dict())
    with torch.no_grad(), pytest.warns(UserWarning, match="the weights have changed"):
        torch.testing.assert_close(module(x), twin(x))
    fastrnn.prepack(module)
    with pytest.warns(UserWarning, match="a call needed gradients"):
        first(module(x)).sum().backward()
    assert module.get_parameter(name).grad.abs().sum() > 0


# ---- DropConnect: Merity et al. (2018) -----------------------------------------------------------------

STACKED = {
    "LSTM": {"num_layers": 2, "bidirectional": True, "proj_size": 2},
    "GRU": {"num_layers": 2},
    "RNN": {},
}
WITH_DROPOUT = [(kind, STACKED.get(kind, {})) for kind in LAYERS + CELLS]
WITH_DROPOUT += [("LSTM", {**STACKED["LSTM"], "peephole": True}), ("LSTMCell", {"peephole": True})]


@pytest.mark.parametrize(("kind", "options"), WITH_DROPOUT)
def test_weight_dropout_draws_one_mask_a_call_for_each_w_hh(kind, options):
    module, x = make(kind, weight_dropout=0.4, **options), make_input(kind).requires_grad_()
    plain = make(kind, **options)
    plain.load_state_dict(module.state_dict())
    weights = {name: w for name, w in module.named_parameters() if name.startswith("weight_hh")}
    outputs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        masks = {name: dropout(torch.ones_like(w), 0.4) for name, w in weights.items()}
        torch.manual_seed(seed)
        found = module(x)
        parameters = dict(module.named_parameters())
        expected = functional_call(plain, parameters | {n: w * masks[n] for n, w in weights.items()}, (x,))
        outputs.append(first(found))
        torch.testing.assert_close(found, expected)
        wanted = [x, *module.parameters()]
        gradients = [torch.autograd.grad(first(out).square().sum(), wanted) for out in (found, expected)]
        torch.testing.assert_close(*gradients)
    if not kind.endswith("Cell"):  # a cell's state is zero here, so that W_hh has no effect
        assert not torch.equal(*outputs)
    module.eval()
    state = torch.get_rng_state()
    torch.testing.assert_close(module(x), plain(x), atol=0, rtol=0)
    assert torch.equal(state, torch.get_rng_state())


def test_weight_dropout_zeroes_a_share_p_and_scales_the_rest():
    module = fastrnn.RNNCell(1, 500, bias=False, weight_dropout=0.25, dtype=torch.float64)
    nn.init.zeros_(module.weight_ih)
    nn.init.constant_(module.weight_hh, 1e-4)
    pre = module(torch.zeros(500, 1, dtype=torch.float64), torch.eye(500, dtype=torch.float64)).atanh()
    zeros = pre.abs() < 1e-12
    assert abs(zeros.double().mean() - 0.25) < 0.01
    torch.testing.assert_close(pre[~zeros], torch.full_like(pre[~zeros], 1e-4 / 0.75))


def test_masks_of_weight_dropout_are_the_same_in_all_steps_and_rows():
    module = make("RNN", weight_dropout=0.5)
    x = make_input("RNN")[:, :1].expand(T, B, I)
    y, h = module(x)
    torch.testing.assert_close(y[:, 0], y[:, 1])
    torch.manual_seed(3)
    y, _ = module(x)
    torch.manual_seed(3)
    w_hh = dropout(module.weight_hh_l0, 0.5)
    h = torch.zeros(B, H, dtype=torch.float64)
    for t in range(T):
        h = torch.tanh(x[t] @ module.weight_ih_l0.T + module.bias_ih_l0 + h @ w_hh.T + module.bias_hh_l0)
        torch.testing.assert_close(y[t], h)


@pytest.mark.filterwarnings("ignore:fastrnn")
def test_weight_dropout_runs_without_kernels_and_in_other_forms():
    module, x = make("LSTM", weight_dropout=0.5), make_input("LSTM")
    torch.manual_seed(5)
    expected = module(x)
    torch.manual_seed(5)
    packed, hidden = module(pack_padded_sequence(x, torch.full((B,), T)))
    torch.testing.assert_close((pad_packed_sequence(packed)[0], hidden), expected)
    torch.manual_seed(5)
    torch.testing.assert_close(module(x, lengths=[T] * B), expected)
    torch.manual_seed(5)
    low = module.bfloat16()(x.bfloat16())
    torch.testing.assert_close(low, expected, atol=0.05, rtol=0.05, check_dtype=False)


# ---- Derivatives and transforms ------------------------------------------------------------------------

SMALL = [
    ("LSTM", {"peephole": True}),
    ("LSTM", {"peephole": True, "proj_size": 1, "bidirectional": True}),
    ("LSTMCell", {"peephole": True}),
    ("LSTM", {"coupled": True, "proj_size": 1, "bidirectional": True}),
    ("LSTMCell", {"coupled": True}),
    ("LSTM", {"weight_dropout": 0.5, "peephole": True}),
    ("GRU", {"weight_dropout": 0.5}),
    ("RNN", {"weight_dropout": 0.5}),
    ("GRUCell", {"weight_dropout": 0.5}),
]


def seeded(module):
    """Of its parameters, with the same masks in each call."""
    names = [name for name, _ in module.named_parameters()]

    def function(x, *parameters):
        torch.manual_seed(7)
        result = functional_call(module, dict(zip(names, parameters, strict=True)), (x,))
        return tuple(flat(result)) if isinstance(result, tuple) and isinstance(result[1], tuple) else result

    return function


@pytest.mark.parametrize(("kind", "options"), SMALL)
def test_derivatives_of_first_and_second_order_and_forward_mode(kind, options):
    module = getattr(fastrnn, kind)(2, 2, dtype=torch.float64, **options)
    shape = (2, 2) if kind.endswith("Cell") else (2, 2, 2)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    arguments = (x, *module.parameters())
    assert torch.autograd.gradcheck(seeded(module), arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(seeded(module), arguments)


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_vmap_over_inputs_and_gradients_of_each_sample(kind):
    module = make(kind, peephole=True)
    x = torch.stack([make_input(kind) for _ in range(3)])
    found = vmap(lambda x: first(module(x)))(x)
    torch.testing.assert_close(found, torch.stack([first(module(one)) for one in x]))

    def loss(parameters, x):
        return first(functional_call(module, parameters, (x,))).square().sum()

    parameters = {name: p.detach() for name, p in module.named_parameters()}
    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, one in enumerate(x):
        expected = grad(loss)(parameters, one)
        torch.testing.assert_close({name: g[i] for name, g in found.items()}, expected)


def test_vmap_draws_masks_as_it_is_told():
    module, x = make("GRU", weight_dropout=0.5), make_input("GRU").expand(3, T, B, I)
    same = vmap(lambda x: module(x)[0], randomness="same")(x)
    torch.testing.assert_close(same[0], same[1])
    different = vmap(lambda x: module(x)[0], randomness="different")(x)
    assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LSTM", {"peephole": True, "weight_dropout": 0.5, "num_layers": 2, "bidirectional": True}),
        ("LSTMCell", {"peephole": True, "weight_dropout": 0.5}),
        ("GRU", {"weight_dropout": 0.5}),
    ],
)
def test_compiled_whole_with_gradients(kind, options):
    torch._dynamo.reset()
    module, x = make(kind, **options), make_input(kind)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = []
    for function in (module, compiled):
        torch.manual_seed(9)
        y = first(function(x))
        found.append((y, torch.autograd.grad(y.square().sum(), list(module.parameters()))))
    torch.testing.assert_close(*found)
    module.eval()
    torch.testing.assert_close(compiled(x), module(x))


# ---- Recorded graphs -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:fastrnn", "ignore:.*deprecated")
@pytest.mark.parametrize(
    ("kind", "options"),
    [("LSTM", {"peephole": True}), ("LSTMCell", {"peephole": True}), ("LSTM", {"weight_dropout": 0.5})],
)
def test_traced_and_exported_modules_compute_the_same(kind, options):
    module, x = make(kind, **options), make_input(kind)
    traced = torch.jit.trace(module, (x,), check_trace=False)
    runs = []
    for function in (module, traced):
        torch.manual_seed(11)
        runs.append(function(x))
    torch.testing.assert_close(*runs)
    module.eval()
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))


# ---- Initialisation ------------------------------------------------------------------------------------


def biases(module):
    """b_ih and b_hh of each layer and direction, [4, H]."""
    parameters = dict(module.named_parameters())
    return [
        (p.detach().view(4, -1), parameters[name.replace("bias_ih", "bias_hh")].detach().view(4, -1))
        for name, p in parameters.items()
        if name.startswith("bias_ih")
    ]


@pytest.mark.parametrize(("kind", "options"), [("LSTM", STACKED["LSTM"]), ("LSTM", {}), ("LSTMCell", {})])
@pytest.mark.parametrize("v", [1, -0.5, 0])
def test_forget_bias_changes_the_forget_gates_bias_and_nothing_else(kind, options, v):
    torch.manual_seed(0)
    plain = make(kind, **options)
    torch.manual_seed(0)
    module = make(kind, forget_bias=v, **options)
    for again in (False, True):
        if again:
            torch.manual_seed(0)
            module.reset_parameters()
        for b_ih, b_hh in biases(module):
            assert (b_ih[1] == v).all()
            assert (b_hh[1] == 0).all()
        for (name, p), expected in zip(module.named_parameters(), plain.parameters(), strict=True):
            if name.startswith("bias"):
                p, expected = (t.view(4, -1)[[0, 2, 3]] for t in (p, expected))
            assert torch.equal(p, expected)


@pytest.mark.parametrize("package", [nn, fastrnn])
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_orthogonal_makes_each_gates_block_orthogonal(kind, package):
    module = getattr(package, kind)(I, H, dtype=torch.float64, **STACKED.get(kind, {}))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    assert fastrnn.init.orthogonal_(module) is module
    for name, p in module.named_parameters():
        if not name.startswith("weight_hh"):
            assert torch.equal(p, before[name])
            continue
        for block in p.detach().split(H):
            torch.testing.assert_close(block.T @ block, torch.eye(block.shape[1], dtype=torch.float64))
    assert all(p.requires_grad for p in module.parameters())


def test_chrono_draws_forget_biases_for_memories_up_to_t_max():
    model = nn.ModuleDict(
        {
            "a": nn.LSTM(I, 400, num_layers=2, bidirectional=True),
            "b": fastrnn.LSTMCell(I, 400),
            "c": nn.GRU(I, H),
        }
    ).double()
    untouched = copy.deepcopy(model)
    assert fastrnn.init.chrono_(model, 101) is model
    for name in "ab":
        for (b_ih, b_hh), (old_ih, old_hh) in zip(biases(model[name]), biases(untouched[name]), strict=True):
            b = b_ih + b_hh
            u = b[1].exp()  # uniform in [1, 100]
            assert 1 <= u.min() < 3
            assert 98 < u.max() <= 100
            assert abs(u.mean() - 50.5) < 4 * 99 / math.sqrt(12 * 400)
            assert torch.equal(b[0], -b[1])
            assert torch.equal(b_ih[2:], old_ih[2:])
            assert torch.equal(b_hh[2:], old_hh[2:])
    for p, old in zip(model["c"].parameters(), untouched["c"].parameters(), strict=True):
        assert torch.equal(p, old)


def test_initialisations_undo_packs():
    module = fastrnn.prepack(fastrnn.LSTM(I, H).eval())
    fastrnn.init.orthogonal_(module)
    with torch.no_grad(), pytest.warns(UserWarning, match="weights have changed"):
        module(make_input("LSTM", torch.float32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fastrnn.init.orthogonal_(nn.Linear(2, 2)), "no RNN, LSTM, GRU.* in Linear"),
        (
            lambda: fastrnn.init.forget_bias_(nn.Sequential(nn.GRU(2, 2)), 1),
            "no LSTM, LSTMCell in Sequential",
        ),
        (lambda: fastrnn.init.chrono_(nn.LSTM(2, 2), 1.5), "t_max should be .* got 1.5"),
        (lambda: fastrnn.init.chrono_(nn.LSTM(2, 2), math.nan), "t_max should be .* got nan"),
        (lambda: fastrnn.init.chrono_(nn.LSTM(2, 2, bias=False), 9), "LSTM has no parameter bias_ih_l0"),
        (lambda: fastrnn.init.forget_bias_(nn.LSTMCell(2, 2, bias=False), 1), "LSTMCell has no .* bias_ih"),
        (
            lambda: fastrnn.init.orthogonal_(
                nn.ModuleDict({"a": parametrizations.weight_norm(nn.GRU(2, 2), "weight_hh_l0")})
            ),
            "a has no parameter weight_hh_l0.*parametrized",
        ),
    ],
)
def test_initialisations_name_what_they_cannot_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- Bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GRU", "RNN", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("option", [{"peephole": True}, {"forget_bias": 1.0}])
def test_options_of_other_cells_are_unknown_keywords(kind, option):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(option))}'"):
        make(kind, **option)


@pytest.mark.parametrize("kind", LAYERS + CELLS)
@pytest.mark.parametrize("p", [1.0, -0.1, 2, math.nan, "0.5", None, True])
def test_weight_dropout_is_a_probability_below_one(kind, p):
    with pytest.raises(
        ValueError, match=r"weight_dropout should be a number in range \[0, 1\), got " + repr(p)
    ):
        make(kind, weight_dropout=p)


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"peephole": 1}, TypeError, "peephole should be of type bool, got: int"),
        ({"coupled": "yes"}, TypeError, "coupled should be of type bool, got: str"),
        (
            {"peephole": True, "coupled": True},
            ValueError,
            "peephole=True and coupled=True cannot be combined",
        ),
        ({"forget_bias": "1"}, ValueError, "forget_bias should be None or a finite number, got '1'"),
        ({"forget_bias": True}, ValueError, "forget_bias should be None or a finite number, got True"),
        ({"forget_bias": math.inf}, ValueError, "forget_bias should be None or a finite number, got inf"),
        ({"forget_bias": 1.0, "bias": False}, ValueError, "forget_bias=1.0 needs biases, got bias=False"),
    ],
)
def test_values_that_cannot_be_are_refused_at_construction(kind, options, error, message):
    with pytest.raises(error, match=message):
        make(kind, **options)


def test_a_cell_without_units_has_no_peepholes():
    with pytest.raises(ValueError, match="peephole=True needs hidden_size > 0, got 0"):
        fastrnn.LSTMCell(3, 0, peephole=True)


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_options_are_given_by_keyword_alone(kind):
    parameters = inspect.signature(getattr(fastrnn, kind)).parameters
    assert parameters["weight_dropout"].kind is inspect.Parameter.KEYWORD_ONLY
    assert nn.utils.skip_init(fastrnn.LSTMCell, 2, 3, peephole=True).weight_ci.shape == (3,)


# ---- Options beside the rest -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_options_that_are_off_leave_no_trace(kind):
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(I, H)
    torch.manual_seed(0)
    off = {"weight_dropout": 0} | (
        {"peephole": False, "coupled": False, "forget_bias": None} if "LSTM" in kind else {}
    )
    ours = getattr(fastrnn, kind)(I, H, **off)
    assert vars(ours).keys() == vars(theirs).keys()
    assert repr(ours) == repr(theirs)
    for (name, p), (expected_name, expected) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert name == expected_name
        assert torch.equal(p, expected)


def test_options_stand_in_the_repr_in_torchs_style():
    module = fastrnn.LSTM(3, 4, num_layers=2, peephole=True, weight_dropout=0.5, forget_bias=1)
    assert repr(module) == "LSTM(3, 4, num_layers=2, peephole=True, weight_dropout=0.5, forget_bias=1.0)"
    assert repr(fastrnn.RNNCell(3, 4, weight_dropout=0.5)) == "RNNCell(3, 4, weight_dropout=0.5)"


def test_explain_names_options_and_their_operator():
    module = fastrnn.LSTM(3, 4, num_layers=2, peephole=True, weight_dropout=0.5, forget_bias=1)
    found = fastrnn.explain(module, torch.randn(5, 2, 3))
    assert [layer.operator for layer in found] == ["fastrnn::lstm_peephole"] * 2
    assert [layer.options for layer in found] == ["peephole=True, weight_dropout=0.5"] * 2
    assert "layer 1 (peephole=True, weight_dropout=0.5): fastrnn::lstm_peephole" in str(found)
    (found,) = fastrnn.explain(fastrnn.GRUCell(3, 4), torch.randn(2, 3))
    assert found.options == ""


def test_to_torch_refuses_what_torch_does_not_have_and_takes_initialisations():
    model = nn.ModuleDict(
        {
            "a": fastrnn.LSTM(3, 4, peephole=True),
            "b": fastrnn.GRUCell(3, 4, weight_dropout=0.5),
            "c": fastrnn.LSTM(3, 4, forget_bias=1.0),
        }
    )
    classes = [type(module) for module in model.values()]
    with pytest.warns(
        UserWarning, match=r"a \(torch.nn has no peephole=True\), b .*no weight_dropout=0.5\)$"
    ):
        fastrnn.to_torch(model)
    assert [type(module) for module in model.values()] == [*classes[:2], nn.LSTM]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastrnn.convert(model)
    assert [type(module) for module in model.values()] == classes


def own(base):
    class Own(base):
        """A user's module with attributes of the options' names."""

        def __init__(self, *args):
            self.weight_dropout, self.forget_bias, self.peephole = 0.5, 1.0, True
            super().__init__(*args)

    return Own(I, H)


@pytest.mark.parametrize("make_own", [lambda: fastrnn.convert(own(nn.LSTM)), lambda: own(fastrnn.LSTM)])
def test_attributes_of_a_users_class_are_no_options(make_own):
    torch.manual_seed(0)
    theirs = nn.LSTM(I, H)
    torch.manual_seed(0)
    module, x = make_own(), make_input("LSTM", torch.float32)
    assert isinstance(module, fastrnn.LSTM)
    torch.testing.assert_close(module(x), theirs(x))
    torch.manual_seed(0)
    module.reset_parameters()
    torch.testing.assert_close(dict(module.named_parameters()), dict(theirs.named_parameters()))


# ---- The functional forms ----------------------------------------------------------------------------------


def test_the_functional_forms_take_peepholes_after_torchs_parameters():
    lstm, x = make("LSTM", peephole=True, proj_size=2), make_input("LSTM")
    hx = tuple(t.detach() for t in initial(lstm))
    params = [getattr(lstm, name) for name in lstm._flat_weights_names]
    assert [p.dim() for p in params] == [2, 2, 1, 1, 2, 1, 1, 1]
    found = functional.lstm_peephole(x, hx, params, True, 1, 0.0, False, False, False)
    torch.testing.assert_close(list(found), list(peephole_lstm(lstm, x, hx)[:3]))
    cell = make("LSTMCell", peephole=True, bias=False)
    vectors = [getattr(cell, name) for name in PEEPHOLES]
    hx = tuple(torch.randn(B, H, dtype=torch.float64) for _ in "hc")
    found = functional.lstm_peephole_cell(x[0], hx, cell.weight_ih, cell.weight_hh, None, None, *vectors)
    torch.testing.assert_close(found, cell(x[0], hx))


def test_vectors_of_another_size_are_refused():
    lstm = make("LSTM", peephole=True)
    lstm.weight_cf_l0 = nn.Parameter(torch.zeros(H + 3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"u must be \[U, H\] = \[3, 4\], got \[3, 5\]"):
        lstm(make_input("LSTM"))
