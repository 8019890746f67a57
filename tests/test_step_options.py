"""The options that act on the states between steps: every one alone and in pairs, in every form of a call."""

import itertools
import math

import pytest
import torch
from step_loop import (
    CELLS,
    LAYERS,
    SINGLE,
    B,
    H,
    I,
    T,
    as_hx,
    assert_same_with_gradients,
    flat,
    initial,
    loop,
    make,
    options_of,
    randn,
    seeded,
)  # fmt: skip
from torch import nn
from torch.func import vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import fastrnn
from fastrnn import step_options

pytestmark = pytest.mark.filterwarnings("error:fastrnn")  # on the kernels

# ---- Every option, alone and in pairs ------------------------------------------------------------------

MORE = [("LSTM", {"zoneout": (0.5, 0.0)}), ("LSTM", {"zoneout": (0.0, 0.5)})]
MORE += [(kind, {"variational_dropout": p}) for kind in LAYERS for p in ((0.5, 0.0), (0.0, 0.5))]
MORE += [("LSTM", {name: SINGLE[name], "peephole": True}) for name in options_of("LSTM")]
MORE += [(kind, options_of(kind) | {"bias": False}) for kind in LAYERS]
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

# Of each kind everything that goes together.
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
        y, hidden = module(x, lengths=lengths)
        packed, expected = torchs(pack_padded_sequence(x, lengths, enforce_sorted=False))
        torch.testing.assert_close(y, pad_packed_sequence(packed)[0][..., H:])
        torch.testing.assert_close(flat((y, hidden))[1:], [h[1:] for h in flat((y, expected))[1:]])


@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_is_one_step_of_the_layer(kind):
    options = options_of(kind) | ({"peephole": True, "zoneout": (0.3, 0.6)} if kind == "LSTMCell" else {})
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


# ---- Beside the specification ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["LSTM", "LSTM-proj", "LSTM-layer_norm", "LSTM-coupled", "GRU", "RNN", "SLSTM"]
)
@pytest.mark.parametrize("form", ["dense", "batch_first", "packed"])
def test_rows_and_units_that_threads_share(monkeypatch, kind, form, threads):
    """More rows and units than one thread takes, against reference.py."""
    kind, _, way = kind.partition("-")
    T, B, I, H = 7, 37, 20, 72
    options = options_of(kind) if kind in LAYERS else {}
    options = {name: value for name, value in options.items() if name not in ("heads", "reverse")}
    if way == "layer_norm":
        options = {name: options[name] for name in ("zoneout", "variational_dropout")}
    options |= {"proj_size": 40} if way == "proj" else {way: True} if way else {}
    module = getattr(fastrnn, kind)(I, H, bidirectional=True, dtype=torch.float64, **options)
    x, lengths, reset = randn(T, B, I), torch.arange(B) % (T + 1), torch.rand(T, B) < 0.3
    keywords: dict = {"lengths": lengths, "reset": reset}
    if form == "packed":
        x, keywords = pack_padded_sequence(x, lengths.clamp(1), enforce_sorted=False), {}
    else:
        x = x.requires_grad_()
        hx = module._zeros(x, B)
        to = [randn(*h.shape) for h in (hx if isinstance(hx, tuple) else [hx])]
        to = [t.requires_grad_() for t in (to if way else [t.expand(T, *t.shape).clone() for t in to])]
        keywords["reset_to"] = as_hx(to)
    if form == "batch_first":
        module.batch_first = True
        x, keywords["reset"] = x.transpose(0, 1), reset.T
    results = []
    for reason in (None, "for this test"):
        monkeypatch.setattr(fastrnn.functional, "no_kernel_reason", lambda weight, reason=reason: reason)
        monkeypatch.setattr(fastrnn.functional, "warn", lambda *_: None)
        y, *states = flat(seeded(module, x, **keywords))
        found = [getattr(y, "data", y) if form == "packed" else y, *states]
        wanted = [*module.parameters(), *([] if form == "packed" else [x, *to])]
        loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in found)
        results.append((found, torch.autograd.grad(loss, wanted)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_are_those_of_torchs_dropout(dtype, p):
    rows, states = fastrnn.rows.Rows(T, B), [torch.zeros(2, B, 40, dtype=dtype)] * 2
    options = {"zoneout": p, "recurrent_dropout": p, "variational_dropout": p}
    found = seeded(step_options.draw, options, True, rows, rows.N, states)
    torch.manual_seed(5)
    drawn = [torch.dropout(torch.ones(2, T * B, 40, dtype=dtype), p, True) for _ in range(3)]
    assert torch.equal(found.zoneout[0], drawn[0] == 0)
    assert torch.equal(found.zoneout[1], drawn[1] == 0)
    assert torch.equal(found.candidate, drawn[2])
    assert torch.equal(found.recurrent, torch.dropout(torch.ones(2, B, 40, dtype=dtype), p, True))
