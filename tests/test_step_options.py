"""The options that act on the states between steps, against loops in float64 written from the papers."""

import copy
import itertools
import math
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap
from torch.nn.functional import dropout
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import fastrnn

pytestmark = pytest.mark.filterwarnings("ignore:fastrnn.*no kernel yet")
LAYERS = ["LSTM", "GRU", "RNN"]
CELLS = ["LSTMCell", "GRUCell", "RNNCell"]
T, B, I, H = 5, 3, 3, 4


def make(kind, dtype=torch.float64, **options):
    return getattr(fastrnn, kind)(I, H, dtype=dtype, **options)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def flat(result):
    y, h = result
    return [y, *h] if isinstance(h, tuple) else [y, h]


# ---- The papers, one sequence and one step at a time ---------------------------------------------------


def two(p):
    return p if isinstance(p, tuple) else (p, p)


def draw(module, N, widths):
    """The masks of one layer in the order in which a call draws them; N is (T, B), or (N,) packed."""
    o, D = module._fused_options, 2 if getattr(module, "bidirectional", False) else 1
    masks = {}

    def mask(name, p, *shape):
        if p > 0 and module.training:
            masks[name] = dropout(torch.ones(*shape, dtype=torch.float64), p)

    zoneout, (p_x, p_h) = two(o.get("zoneout", 0.0)), two(o.get("variational_dropout", 0.0))
    mask("x", p_x, B, widths["x"])
    mask("zoneout_h", zoneout[0], D, *N, widths["h"])
    if "c" in widths:
        mask("zoneout_c", zoneout[1], D, *N, widths["c"])
    mask("candidate", o.get("recurrent_dropout", 0.0), D, *N, H)
    mask("h", p_h, D, B, widths["h"])
    return masks


def zoned(p, mask, old, new):
    """Krueger et al. (2017), eq. 3: d * old + (1 - d) * new with P(d = 1) = p; p itself in evaluation."""
    d = p if mask is None else (mask == 0).double()
    return d * old + (1 - d) * new


def clipped_gradient(v, state):
    if v is not None and state.requires_grad:
        state.register_hook(lambda g: g.clamp(-v, v))  # of the complete gradient
    return state


def step(kind, o, p, masks, x, states):
    """x [I] and the states of one row; masks: those of this row and step."""
    h = states[0]
    v, zoneout = o.get("state_gradient_clip"), two(o.get("zoneout", 0.0))
    w_hh = p["weight_hh"]
    if "heads" in o:
        gates = [torch.block_diag(*w.split(H // o["heads"])) for w in w_hh.split(H)]
        w_hh = torch.cat(gates)
    drop = lambda g: g * masks.get("candidate", 1.0)  # noqa: E731  Semeniuta et al. (2016)
    gx = p["weight_ih"] @ x + p["bias_ih"]
    gh = w_hh @ (h * masks.get("h", 1.0)) + p["bias_hh"]  # Gal and Ghahramani (2016)
    if "RNN" in kind:
        return (clipped_gradient(v, zoned(zoneout[0], masks.get("zoneout_h"), h, torch.tanh(gx + gh))),)
    if "GRU" in kind:
        (xr, xz, xn), (hr, hz, hn) = gx.reshape(3, -1), gh.reshape(3, -1)
        z = torch.sigmoid(xz + hz)
        n = (1 - z) * drop(torch.tanh(xn + torch.sigmoid(xr + hr) * hn)) + z * h
        return (clipped_gradient(v, zoned(zoneout[0], masks.get("zoneout_h"), h, n)),)
    c = states[1]
    i, f, g, o_ = (gx + gh).reshape(4, -1)
    peepholes = [p.get(f"weight_c{gate}", torch.zeros(H, dtype=torch.float64)) for gate in "ifo"]
    i, f = torch.sigmoid(i + peepholes[0] * c), torch.sigmoid(f + peepholes[1] * c)
    new = f * c + i * drop(torch.tanh(g))
    if "cell_clip" in o:
        new = new.clamp(-o["cell_clip"], o["cell_clip"])
    if zoneout[1] == 0:
        new = clipped_gradient(v, new)
    new_h = torch.sigmoid(o_ + peepholes[2] * new) * torch.tanh(new)
    if "weight_hr" in p:
        new_h = p["weight_hr"] @ new_h
    if zoneout[1] > 0:
        new = clipped_gradient(v, zoned(zoneout[1], masks.get("zoneout_c"), c, new))
    return clipped_gradient(v, zoned(zoneout[0], masks.get("zoneout_h"), h, new_h)), new


def loop(module, x, hx=None, lengths=None, reset=None, reset_to=None, packed=False):
    """[y [T, B, D*P], the last states, every state [T, L*D, B, *]] time-major, zeros in padding. reset_to:
    [T, L*D, B, *] of each state. packed: the masks have rows of a packed sequence."""
    kind, o = type(module).__name__, module._fused_options
    ways = ["", "_reverse"] if module.bidirectional else [""]
    widths = {"h": module.proj_size or H} | ({"c": H} if kind == "LSTM" else {})
    lengths = [len(x)] * B if lengths is None else lengths.tolist()
    sizes = [sum(n > t for n in lengths) for t in range(len(x))]
    ranks = sorted(range(B), key=lambda b: -lengths[b])
    last, every = [], []
    for k in range(module.num_layers):
        masks = draw(module, (sum(sizes),) if packed else (len(x), B), widths | {"x": x.shape[2]})
        ys = []
        for d, way in enumerate(ways):
            suffix, place = f"_l{k}{way}", k * len(ways) + d
            p = {n.removesuffix(suffix): w for n, w in module.named_parameters() if n.endswith(suffix)}
            all_states = [[[x.new_zeros(w)] * B for _ in x] for w in widths.values()]
            ends = []
            for b, length in enumerate(lengths):
                rank = ranks.index(b)
                states = [
                    x.new_zeros(w) if hx is None else hx[i][place, b] for i, w in enumerate(widths.values())
                ]
                times = list(range(length))
                for s, t in enumerate(reversed(times) if way or o.get("reverse") else times):
                    m = s if o.get("reverse") else t  # masks lie in the order of the steps
                    at = {n: w[d, m, b] for n, w in masks.items() if w.dim() == 4}
                    if packed:
                        rows = {n: w for n, w in masks.items() if n not in ("x", "h")}
                        at = {n: w[d, sum(sizes[:m]) + rank] for n, w in rows.items()}
                    if "h" in masks:
                        at["h"] = masks["h"][d, rank if packed else b]
                    if reset is not None and reset[t, b]:
                        states = [torch.zeros_like(h) for h in states]
                        if reset_to is not None:
                            states = [to[t, place, b] for to in reset_to]
                    now = x[t, b] * masks["x"][rank if packed else b] if "x" in masks else x[t, b]
                    states = step(kind, o, p, at, now, states)
                    for of_all, state in zip(all_states, states, strict=True):
                        of_all[t][b] = state
                ends.append(states)
            stacked = [torch.stack([torch.stack(at) for at in of_all]) for of_all in all_states]
            last.append([torch.stack(parts) for parts in zip(*ends, strict=True)])
            every.append(stacked)
            ys.append(stacked[0])
        x = torch.cat(ys, -1)
    last = [torch.stack(parts) for parts in zip(*last, strict=True)]
    return x, last, [torch.stack(parts, 1) for parts in zip(*every, strict=True)]


def assert_same_with_gradients(found, expected, wanted):
    torch.testing.assert_close(list(found), list(expected))
    weights = [torch.randn_like(e) for e in expected]
    gradients = [
        torch.autograd.grad(
            sum((o * w).sum() for o, w in zip(out, weights, strict=True)),
            wanted,
            retain_graph=True,
            materialize_grads=True,
        )
        for out in (found, expected)
    ]
    torch.testing.assert_close(*gradients)


def seeded(function, *args, **keywords):
    torch.manual_seed(5)
    return function(*args, **keywords)


def initial(module, B=B):
    LD = module.num_layers * (2 if module.bidirectional else 1)
    widths = [module.proj_size or H, H][: 2 if isinstance(module, nn.LSTM) else 1]
    return [randn(LD, B, w).requires_grad_() for w in widths]


def as_hx(states):
    return tuple(states) if len(states) > 1 else states[0]


# ---- Every option, alone and in pairs ------------------------------------------------------------------

SINGLE = {
    "zoneout": 0.3,
    "recurrent_dropout": 0.4,
    "variational_dropout": 0.4,
    "cell_clip": 0.2,
    "state_gradient_clip": 0.15,
    "heads": 2,
    "reverse": True,
}
NOT_OF = {"LSTM": set(), "GRU": {"cell_clip"}, "RNN": {"cell_clip", "recurrent_dropout"}}
NOT_OF_CELLS = {"variational_dropout", "reverse"}


def options_of(kind):
    missing = NOT_OF[kind.removesuffix("Cell")] | (NOT_OF_CELLS if kind.endswith("Cell") else set())
    return {name: value for name, value in SINGLE.items() if name not in missing}


STACKS = {"plain": {}, "stack": {"num_layers": 2, "bidirectional": True}}
MORE = [("LSTM", {"zoneout": (0.5, 0.0)}), ("LSTM", {"zoneout": (0.0, 0.5)})]
MORE += [(kind, {"variational_dropout": p}) for kind in LAYERS for p in ((0.5, 0.0), (0.0, 0.5))]
MORE += [("LSTM", {name: SINGLE[name], "peephole": True}) for name in options_of("LSTM")]
MORE += [
    ("LSTM", {name: SINGLE[name], "num_layers": 2, "bidirectional": name != "reverse", "proj_size": 2})
    for name in options_of("LSTM")
    if name != "heads"
]
ALONE = [
    (kind, {name: value, **stack})
    for kind in LAYERS
    for name, value in options_of(kind).items()
    for stack in ({}, {"num_layers": 2, "bidirectional": name != "reverse"})
] + MORE


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("kind", "options"), ALONE, ids=str)
def test_each_option_follows_its_paper_with_gradients(kind, options, training):
    module = make(kind, **options).train(training)
    x, hx = randn(T, B, I).requires_grad_(), initial(module)
    y, last, _ = seeded(loop, module, x, hx)
    found = flat(seeded(module, x, as_hx(hx)))
    assert_same_with_gradients(found, [y, *last], [x, *hx, *module.parameters()])
    torch.testing.assert_close(seeded(module, x)[0], seeded(loop, module, x)[0])


@pytest.mark.parametrize(
    ("kind", "names"),
    [(kind, pair) for kind in LAYERS for pair in itertools.combinations(options_of(kind), 2)]
    + [(kind, tuple(options_of(kind))) for kind in LAYERS],
    ids=str,
)
def test_pairs_of_options_and_all_at_once_follow_their_papers(kind, names):
    options = {name: SINGLE[name] for name in names}
    module = make(kind, num_layers=2, **options)
    x, hx = randn(T, B, I).requires_grad_(), initial(module)
    lengths, reset = torch.tensor([2, 5, 4]), torch.rand(T, B) < 0.3
    reset_to = [randn(T, *h.shape).requires_grad_() for h in hx]
    y, last, every = seeded(loop, module, x, hx, lengths, reset, reset_to)
    keywords = {"lengths": lengths, "reset": reset, "reset_to": as_hx(reset_to)}
    found = flat(seeded(module, x, as_hx(hx), **keywords))
    wanted = [x, *hx, *reset_to, *module.parameters()]
    assert_same_with_gradients(found, [y, *last], wanted)
    found = flat(seeded(module, x, as_hx(hx), **keywords, return_states=True))
    assert_same_with_gradients(found, [y, *every], wanted)


# ---- Forms of a call -------------------------------------------------------------------------------------

# Of each kind everything that goes together; zoneout and heads have no projection beside them in one of these.
FORMS = [
    (
        "LSTM",
        {name: SINGLE[name] for name in options_of("LSTM") if name != "reverse"} | {"bidirectional": True},
    ),
    ("LSTM", {name: SINGLE[name] for name in options_of("LSTM") if name != "heads"} | {"proj_size": 2}),
    ("GRU", options_of("GRU")),
    ("RNN", options_of("RNN")),
    ("GRU", {"reverse": True}),
    ("LSTM", {"heads": 2}),
]


@pytest.fixture(params=FORMS, ids=str)
def module(request):
    kind, options = request.param
    return make(kind, num_layers=2, **options)


def test_batch_first_and_unbatched_calls_have_the_same_masks(module):
    x, hx, reset = randn(T, B, I), initial(module), torch.rand(T, B) < 0.4
    to = [randn(*h.shape) for h in hx]
    stepwise = [t.expand(T, *t.shape) for t in to]
    lengths = torch.tensor([4, 0, 5])
    y, last, every = seeded(loop, module, x, hx, lengths, reset, stepwise)
    module.batch_first = True
    keywords = {"lengths": lengths, "reset": reset.T, "reset_to": as_hx(to)}
    found = seeded(module, x.transpose(0, 1), as_hx(hx), **keywords)
    torch.testing.assert_close(flat(found), [y.transpose(0, 1), *last])
    found = seeded(module, x.transpose(0, 1), as_hx(hx), **keywords, return_states=True)
    torch.testing.assert_close(flat(found), [y.transpose(0, 1), *every])
    x, hx, reset, to = x[:, 1:2], [h[:, 1:2] for h in hx], reset[:, 1:2], [t[:, 1:2] for t in to]
    found = seeded(
        module,
        x[:, 0],
        as_hx([h[:, 0] for h in hx]),
        reset=reset[:, 0],
        reset_to=as_hx([t[:, 0] for t in to]),
    )
    expected = seeded(module, x.transpose(0, 1), as_hx(hx), reset=reset.T, reset_to=as_hx(to))
    torch.testing.assert_close(flat(found), [expected[0][0], *(h[:, 0] for h in flat(expected)[1:])])


def test_packed_sequences(module):
    x, hx, lengths = randn(T, B, I).requires_grad_(), initial(module), torch.tensor([2, 5, 1])
    packed, hidden = seeded(module, pack_padded_sequence(x, lengths, enforce_sorted=False), as_hx(hx))
    found = flat((pad_packed_sequence(packed)[0], hidden))
    y, last, _ = seeded(loop, module, x, hx, lengths, packed=True)
    assert_same_with_gradients(found, [y, *last], [x, *hx, *module.parameters()])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("stepwise", [False, True], ids=["constant", "stepwise"])
def test_reset_to_sets_the_states_with_their_gradient(kind, stepwise):
    module = make(kind, num_layers=2, bidirectional=True, **({"proj_size": 2} if kind == "LSTM" else {}))
    x, hx, reset = randn(T, B, I), initial(module), torch.rand(T, B) < 0.4
    to = [randn(*([T] if stepwise else []), *h.shape).requires_grad_() for h in hx]
    y, last, _ = loop(
        module, x, hx, None, reset, [t.expand(T, *h.shape) for t, h in zip(to, hx, strict=True)]
    )
    found = flat(module(x, as_hx(hx), reset=reset, reset_to=as_hx(to)))
    assert_same_with_gradients(found, [y, *last], [*to, *hx, *module.parameters()])


def test_nothing_in_the_padding_reaches_a_derivative(module):
    x, hx, lengths, reset = (
        randn(T, B, I),
        initial(module),
        torch.tensor([2, 5, 0]),
        torch.ones(T, B, dtype=torch.bool),
    )
    to = [randn(T, *h.shape) for h in hx]
    results = []
    for junk in (0.0, math.nan):
        for t, b in itertools.product(range(T), range(B)):
            if t >= lengths[b]:
                x[t, b] = junk
                for state in to:
                    state[t, :, b] = junk
        found = flat(seeded(module, x, as_hx(hx), lengths=lengths, reset=reset, reset_to=as_hx(to)))
        gradients = torch.autograd.grad(sum(o.square().sum() for o in found), list(module.parameters()))
        results.append((found, gradients))
    assert not any(g.isnan().any() for g in results[1][1])
    torch.testing.assert_close(*results)


def test_a_reversed_layer_is_the_second_direction_of_torchs():
    x, lengths = randn(T, B, I), torch.tensor([2, 5, 4])
    for kind in LAYERS:
        torchs = getattr(nn, kind)(I, H, bidirectional=True, dtype=torch.float64)
        module = make(kind, reverse=True)
        module.load_state_dict(
            {n.removesuffix("_reverse"): w for n, w in torchs.state_dict().items() if n.endswith("_reverse")}
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # on the kernels
            y, hidden = module(x, lengths=lengths)
        packed, expected = torchs(pack_padded_sequence(x, lengths, enforce_sorted=False))
        torch.testing.assert_close(y, pad_packed_sequence(packed)[0][..., H:])
        torch.testing.assert_close(flat((y, hidden))[1:], [h[1:] for h in flat((y, expected))[1:]])


@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_is_one_step_of_the_layer(kind):
    options = {name: value for name, value in options_of(kind).items()} | (
        {"peephole": True, "zoneout": (0.3, 0.6)} if kind == "LSTMCell" else {}
    )
    for names in ([*options], *([name] for name in options)):
        some = {name: options[name] for name in names}
        cell, layer = make(kind, **some), make(kind.removesuffix("Cell"), **some)
        layer.load_state_dict({f"{name}_l0": w for name, w in cell.state_dict().items()})
        x, hx = randn(1, B, I).requires_grad_(), initial(layer)
        for training in (True, False):
            found = seeded(cell.train(training), x[0], as_hx([h[0] for h in hx]))
            expected = flat(seeded(layer.train(training), x, as_hx(hx)))
            expected = [h[0] for h in expected[1:]]
            found = list(found) if isinstance(found, tuple) else [found]
            gradients = [
                torch.autograd.grad(sum(h.square().sum() for h in out), hx) for out in (found, expected)
            ]
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(*gradients)
        cell(x[0, 0])


# ---- Masks -----------------------------------------------------------------------------------------------


def test_masks_have_their_shares_and_scales():
    x = torch.zeros(50, 4, 1, dtype=torch.float64)
    gru = fastrnn.GRU(1, 100, bias=False, zoneout=0.25, dtype=torch.float64)
    h_0 = torch.ones(1, 4, 100, dtype=torch.float64)
    nn.init.zeros_(gru.weight_hh_l0)  # without zoneout h halves at every step
    y, _ = gru(x, h_0)
    kept = torch.cat((h_0, y))[:-1] == y
    assert abs(kept.double().mean() - 0.25) < 0.01
    assert abs(kept.double().mean((0, 1)) - 0.25).max() < 0.15  # of each unit
    torch.testing.assert_close(gru.eval()(x, h_0)[0][0, 0], torch.full((100,), 0.25 + 0.75 / 2).double())
    lstm = fastrnn.LSTM(1, 100, recurrent_dropout=0.25, dtype=torch.float64)
    nn.init.zeros_(lstm.weight_hh_l0)
    twin = fastrnn.LSTM(1, 100, dtype=torch.float64)
    twin.load_state_dict(lstm.state_dict())
    _, (_, c) = lstm(x[:1])
    scale = c / twin(x[:1])[1][1]
    assert set(scale.flatten().mul(3).round(decimals=6).tolist()) == {0.0, 4.0}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("GRU", {"zoneout": 0.5}), ("LSTM", {"recurrent_dropout": 0.5}), ("RNN", {"variational_dropout": 0.5})],
)
def test_a_seed_gives_the_same_masks_and_another_seed_others(kind, options):
    module, x = make(kind, **options), randn(T, B, I)
    assert torch.equal(seeded(module, x)[0], seeded(module, x)[0])
    torch.manual_seed(6)
    assert not torch.equal(module(x)[0], seeded(module, x)[0])
    module.eval()
    state = torch.get_rng_state()
    module(x)
    assert torch.equal(state, torch.get_rng_state())


def test_recomputation_by_checkpoint_has_the_same_masks(module):
    x = randn(T, B, I).requires_grad_()
    found = []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=False)):
        y, _ = seeded(run, x)
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])))
    torch.testing.assert_close(*found)


def test_vmap_draws_masks_as_it_is_told():
    for options in ({"zoneout": 0.5}, {"recurrent_dropout": 0.5}, {"variational_dropout": 0.5}):
        module, x = make("GRU", **options), randn(T, B, I).expand(3, T, B, I)
        same = vmap(lambda x, module=module: module(x)[0], randomness="same")(x)
        torch.testing.assert_close(same[0], same[1])
        different = vmap(lambda x, module=module: module(x)[0], randomness="different")(x)
        assert not torch.equal(different[0], different[1])
