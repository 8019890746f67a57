"""``SLSTM`` against a loop in float64 in the form of its authors' code (Beck et al. 2024), row by row."""

import copy
import itertools
import pickle

import pytest
import torch
from test_options import assert_same_with_gradients
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import functional

T, B, I, H = 5, 3, 3, 4
STATES = ("h", "c", "n", "m")


def step(x, states, p, heads):
    """x [I], states [H]; p is what state_dict() has of one direction, by name without its suffix."""
    h, c, n, m = states
    raw = p["weight_ih"] @ x + p.get("bias_ih", 0)
    of_heads = p["weight_hh"].view(4, heads, H // heads, H // heads)
    recurrent = torch.einsum("ghrc,hc->ghr", of_heads, h.view(heads, -1)).flatten()
    iraw, fraw, zraw, oraw = (raw + recurrent).view(4, -1)
    logfplusm = m + logsigmoid(fraw)
    mnew = iraw if torch.all(n == 0.0) else torch.max(iraw, logfplusm)
    ogate = torch.sigmoid(oraw)
    igate = torch.minimum(torch.exp(iraw - mnew), torch.ones_like(iraw))
    fgate = torch.minimum(torch.exp(logfplusm - mnew), torch.ones_like(iraw))
    cnew = fgate * c + igate * torch.tanh(zraw)
    nnew = fgate * n + igate
    return ogate * cnew / nnew, cnew, nnew, mnew


def loop(slstm, x, hx=None, lengths=None, reset=None):
    """(y [T, B, D*H], the last states [L*D, B, H], every one of them [T, L*D, B, H]); zeros in padding."""
    parameters = dict(slstm.named_parameters())
    ways = ["", "_reverse"] if slstm.bidirectional else [""]
    lengths = [len(x)] * x.shape[1] if lengths is None else lengths.tolist()
    zeros, last, every = x.new_zeros(H), [], []
    for k, way in itertools.product(range(slstm.num_layers), ways):
        suffix = f"_l{k}{way}"
        p = {name.removesuffix(suffix): w for name, w in parameters.items() if name.endswith(suffix)}
        ends, steps = [], [[(zeros,) * 4] * x.shape[1] for _ in x]
        for b, length in enumerate(lengths):
            states = (zeros,) * 4 if hx is None else tuple(state[len(last), b] for state in hx)
            for t in reversed(range(length)) if way else range(length):
                if reset is not None and reset[t, b]:
                    states = (zeros,) * 4
                states = steps[t][b] = step(x[t, b], states, p, slstm.heads)
            ends.append(states)
        last.append([torch.stack(parts) for parts in zip(*ends, strict=True)])
        stepwise = [[torch.stack(parts) for parts in zip(*rows, strict=True)] for rows in steps]
        every.append([torch.stack(parts) for parts in zip(*stepwise, strict=True)])
        if way == ways[-1]:
            x = torch.cat([states[0] for states in every[-len(ways) :]], -1)
    last = [torch.stack(parts) for parts in zip(*last, strict=True)]
    return x, last, [torch.stack(parts, 1) for parts in zip(*every, strict=True)]


def make(dtype=torch.float64, **options):
    return fastrnn.SLSTM(I, H, dtype=dtype, **options)


def initial(slstm):
    shape = (slstm.num_layers * (2 if slstm.bidirectional else 1), B, H)
    h, c, n, m = (torch.randn(shape, dtype=torch.float64) for _ in STATES)
    return tuple(state.requires_grad_() for state in (h, c, n.exp() + 1, m))


def make_input():
    return 2 * torch.randn(T, B, I, dtype=torch.float64)


def flat(result):
    return [result[0], *result[1]]


STACKS = [
    {},
    {"bias": False, "heads": 4},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "heads": 2},
]


@pytest.fixture(params=STACKS, ids=str)
def slstm(request):
    return make(**request.param)


# ---- Values and gradients, of all four states -----------------------------------------------------------


def test_layers_follow_the_authors_with_gradients(slstm):
    x, hx = make_input().requires_grad_(), initial(slstm)
    y, last, _ = loop(slstm, x, hx)
    assert_same_with_gradients(flat(slstm(x, hx)), [y, *last], [x, *hx, *slstm.parameters()])
    y, last, _ = loop(slstm, x)  # from the empty state
    assert_same_with_gradients(flat(slstm(x)), [y, *last], [x, *slstm.parameters()])


def test_layers_follow_the_authors_batch_first_and_unbatched(slstm):
    slstm.batch_first = True
    x = make_input()
    y, last, _ = loop(slstm, x)
    torch.testing.assert_close(flat(slstm(x.transpose(0, 1))), [y.transpose(0, 1), *last])
    torch.testing.assert_close(flat(slstm(x[:, 1])), [y[:, 1], *(state[:, 1] for state in last)])
    hx = [state.detach() for state in initial(slstm)]
    y, last, _ = loop(slstm, x, hx)
    found = flat(slstm(x[:, 1], [state[:, 1] for state in hx]))
    torch.testing.assert_close(found, [y[:, 1], *(state[:, 1] for state in last)])


def test_lengths_resets_and_every_state_follow_the_authors(slstm):
    x, hx = make_input().requires_grad_(), initial(slstm)
    lengths, reset = torch.tensor([2, 5, 0]), torch.rand(T, B) < 0.4
    assert reset.any()
    wanted = [x, *hx, *slstm.parameters()]
    y, last, every = loop(slstm, x, hx, lengths, reset)
    found = flat(slstm(x, hx, lengths=lengths, reset=reset))
    assert_same_with_gradients(found, [y, *last], wanted)
    found = flat(slstm(x, hx, lengths=lengths, reset=reset, return_states=True))
    assert_same_with_gradients(found, [y, *every], wanted)


def test_packed_sequences_follow_the_authors(slstm):
    x, hx, lengths = make_input(), initial(slstm), torch.tensor([2, 5, 1])
    packed, states = slstm(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
    y, last, _ = loop(slstm, x, hx, lengths)
    found = [pad_packed_sequence(packed)[0], *states]
    assert_same_with_gradients(found, [y, *last], [*hx, *slstm.parameters()])


def test_steps_one_by_one_are_the_sequence(slstm):
    if slstm.bidirectional:
        pytest.skip("the second direction begins at the end")
    x, states = make_input(), None
    for x_t in x:
        y, states = slstm(x_t.unsqueeze(0), states)
    expected = slstm(x)
    torch.testing.assert_close((y[0], states), (expected[0][-1], expected[1]))


def test_where_past_and_input_are_equal_each_has_half_of_the_gradient_of_m():
    slstm = fastrnn.SLSTM(1, 1, dtype=torch.float64)
    for parameter in slstm.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        slstm.bias_ih_l0.copy_(torch.tensor([1.5, 1000.0, 0.3, 0.2]))  # i = 1.5, log f = 0
    hx = [torch.full((1, 1, 1), v, dtype=torch.float64, requires_grad=True) for v in (0, 0.4, 1, 1.5)]
    _, states = slstm(torch.zeros(1, 1, 1, dtype=torch.float64), hx)
    db, dm = torch.autograd.grad(states[3].sum(), [slstm.bias_ih_l0, hx[3]])
    assert db.tolist() == [0.5, 0, 0, 0]
    assert dm.item() == 0.5


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_large_and_small_exponents_stay_finite(scale):
    """i of either sign and size at the empty state, after it and after a reset."""
    torch.manual_seed(0)
    slstm = make(torch.float32)
    x = (scale * torch.randn(40, B, I)).requires_grad_()
    reset = torch.rand(40, B) < 0.1
    y, states = slstm(x, reset=reset)
    exact = copy.deepcopy(slstm).double()(x.double(), reset=reset)
    assert all(state.isfinite().all() for state in states)
    torch.testing.assert_close(y.double(), exact[0], atol=scale * 1e-5, rtol=0)
    gradients = torch.autograd.grad(y.sum() + sum(s.sum() for s in states), [x, *slstm.parameters()])
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.filterwarnings("ignore:fastrnn")
@pytest.mark.usefixtures("without_16_bit_kernels")
def test_it_runs_without_kernels_too():
    low = make(torch.bfloat16, heads=2, bidirectional=True)
    x, lengths = make_input().bfloat16(), torch.tensor([2, 5, 0])
    exact = copy.deepcopy(low).double()(x.double(), lengths=lengths)
    torch.testing.assert_close(low(x, lengths=lengths), exact, atol=0.05, rtol=0.05, check_dtype=False)
    (found,) = fastrnn.explain(low, x)
    assert found.operator is None


# ---- Derivatives and transforms --------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"heads": 2, "bidirectional": True}])
def test_derivatives_of_first_and_second_order_and_forward_mode(options):
    slstm = fastrnn.SLSTM(2, 2, dtype=torch.float64, **options)
    names = [name for name, _ in slstm.named_parameters()]
    D = 2 if slstm.bidirectional else 1
    x, h, c, m = (torch.randn(s, 2, 2, dtype=torch.float64) for s in (2, D, D, D))
    n = torch.rand(D, 2, 2, dtype=torch.float64) + 1

    def function(x, h, c, n, m, *parameters):
        return tuple(
            flat(functional_call(slstm, dict(zip(names, parameters, strict=True)), (x, (h, c, n, m))))
        )

    arguments = [t.requires_grad_() for t in (x, h, c, n, m)] + list(slstm.parameters())
    assert torch.autograd.gradcheck(function, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, arguments)


def test_derivatives_from_the_empty_state():
    slstm = fastrnn.SLSTM(2, 2, dtype=torch.float64, heads=2)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    reset = torch.tensor([[False, True], [False, False], [True, False]])
    assert torch.autograd.gradcheck(lambda x: tuple(flat(slstm(x, reset=reset))), x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: tuple(flat(slstm(x, reset=reset))), x)


@pytest.mark.parametrize("heads", [1, 2])
def test_vmap_over_inputs_and_gradients_of_each_sample(heads):
    slstm = make(heads=heads)
    x = torch.stack([make_input() for _ in range(3)])
    found = vmap(lambda x: flat(slstm(x)))(x)
    each = [flat(slstm(one)) for one in x]
    torch.testing.assert_close(found, [torch.stack(parts) for parts in zip(*each, strict=True)])

    def loss(parameters, x):
        return sum(part.square().sum() for part in flat(functional_call(slstm, parameters, (x,))))

    parameters = {name: p.detach() for name, p in slstm.named_parameters()}
    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, one in enumerate(x):
        torch.testing.assert_close({n: g[i] for n, g in found.items()}, grad(loss)(parameters, one))


@pytest.mark.parametrize("options", [{}, {"heads": 2, "num_layers": 2, "bidirectional": True}])
def test_compiled_whole_with_gradients_and_exported(options):
    torch._dynamo.reset()
    slstm, x = make(**options), make_input()
    hx = initial(slstm)
    compiled = torch.compile(slstm, fullgraph=True, backend="aot_eager")
    for arguments in ((x,), (x, hx)):
        found, expected = flat(compiled(*arguments)), flat(slstm(*arguments))
        assert_same_with_gradients(found, expected, [*hx, *slstm.parameters()])
    slstm.eval()
    torch.testing.assert_close(torch.export.export(slstm, (x,)).module()(x), slstm(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated", "ignore:.*dynamo")
def test_traces_hold_it_and_other_recordings_refuse_it(tmp_path):
    slstm, x = make(heads=2).eval(), make_input()
    traced = torch.jit.trace(slstm, (x,), check_trace=False)
    torch.testing.assert_close(traced(x), slstm(x))
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script does not take a fastrnn\.SLSTM"):
        torch.jit.script(slstm)
    with pytest.raises(RuntimeError, match=r"torch\.onnx\.export .* not .*SLSTM"):
        torch.onnx.export(slstm, (x,), str(tmp_path / "m.onnx"), dynamo=False)


# ---- Parameters ------------------------------------------------------------------------------------------


def test_heads_see_their_own_units_alone():
    slstm, dense, x = make(heads=2), make(), make_input()
    state = slstm.state_dict()
    assert state["weight_hh_l0"].shape == (4 * H, H // 2)
    wide = torch.zeros(4, H, H, dtype=torch.float64)
    for gate, unit in itertools.product(range(4), range(H)):
        first = unit // 2 * 2
        wide[gate, unit, first : first + 2] = state["weight_hh_l0"][gate * H + unit]
    dense.load_state_dict(state | {"weight_hh_l0": wide.view(4 * H, H)})
    torch.testing.assert_close(slstm(x), dense(x))


@pytest.mark.parametrize("heads", [1, 2])
def test_states_copies_and_pickles_carry_it(heads):
    slstm, x = make(heads=heads, num_layers=2, dropout=0.0), make_input()
    assert repr(slstm) == f"SLSTM(3, 4, num_layers=2{', heads=2' if heads == 2 else ''})"
    other = make(heads=heads, num_layers=2)
    other.load_state_dict(slstm.state_dict())
    for twin in (other, copy.deepcopy(slstm), pickle.loads(pickle.dumps(slstm))):
        torch.testing.assert_close(twin(x), slstm(x), atol=0, rtol=0)
        for p in twin.parameters():
            p.data.mul_(2)
        assert not torch.equal(twin(x)[0], slstm(x)[0])
    other.reset_parameters()
    assert all(0 < p.abs().max() <= H**-0.5 for p in other.parameters())
    torch.testing.assert_close(
        functional_call(slstm, dict(other.named_parameters()), (x,)), other(x), atol=0, rtol=0
    )


def test_conversions_leave_it_and_say_so():
    model = nn.Sequential(make())
    assert type(fastrnn.convert(model)[0]) is fastrnn.SLSTM
    with pytest.warns(UserWarning, match=r"to_torch\(\) leaves as they are: 0 \(torch.nn has no SLSTM\)"):
        assert type(fastrnn.to_torch(model)[0]) is fastrnn.SLSTM


def test_prepack_serves_whole_matrices_and_refuses_heads():
    slstm, x = make(num_layers=2).eval(), make_input()
    expected = slstm(x)
    with torch.no_grad():
        torch.testing.assert_close(fastrnn.prepack(slstm)(x), expected)
    assert all("prepacked" in layer.forward for layer in fastrnn.explain(slstm, x))
    with pytest.raises(ValueError, match="computed at each call"):
        fastrnn.prepack(make(heads=2).eval())


def test_the_functional_form_takes_whole_matrices():
    slstm, x = make(num_layers=2, bidirectional=True), make_input()
    hx = initial(slstm)
    y, *states = functional.slstm(x, hx, list(slstm.parameters()), True, 2, 0.0, False, True, False)
    torch.testing.assert_close([y, *states], flat(slstm(x, hx)))


def test_state_gradient_hooks_see_c():
    slstm, x, seen = make(), make_input(), []
    slstm.register_state_gradient_hook(seen.append)
    y, _ = slstm(x, return_states=True)
    expected = torch.autograd.grad(y.sum(), [y], retain_graph=True)
    y.sum().backward()
    assert seen[0].dc.shape == (1, T * B, H)
    torch.testing.assert_close(seen[0].dh.view(T, B, H)[-1], expected[0][-1])


# ---- Bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"heads": 3}, ValueError, "heads must divide hidden_size = 4, got 3"),
        ({"heads": 0}, ValueError, "heads must divide hidden_size = 4, got 0"),
        ({"heads": 2.0}, TypeError, "heads should be of type int, got: float"),
        ({"heads": True}, TypeError, "heads should be of type int, got: bool"),
        ({"num_layers": 0}, ValueError, "num_layers must be greater than zero"),
        ({"dropout": 2.0}, ValueError, "dropout should be a number in range"),
    ],
)
def test_what_cannot_be_is_refused_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_states_of_another_number_or_size_are_refused():
    slstm, x = make(), make_input()
    hx = [state.detach() for state in initial(slstm)]
    packed = pack_padded_sequence(x, torch.full((B,), T))
    for input in (x, packed):
        with pytest.raises(ValueError, match=r"the four states \(h, c, n, m\), got 2 of them"):
            slstm(input, hx[:2])
        with pytest.raises(ValueError, match=r"the four states \(h, c, n, m\), got Tensor"):
            slstm(input, hx[0])
        with pytest.raises(RuntimeError, match=r"Expected hidden\[2\] size \(1, 3, 4\), got \[1, 3, 1\]"):
            slstm(input, (*hx[:2], hx[2][..., :1], hx[3]))
    with pytest.raises(RuntimeError, match="should also be 3-D but got 3-D, 3-D, 3-D, 2-D"):
        slstm(x, (*hx[:3], hx[3][0]))
    with pytest.raises(ValueError, match="SLSTM: Expected input to be 2D or 3D, got 1D"):
        slstm(x[0, 0])
