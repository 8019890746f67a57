"""The options that act on the states between steps: their parameters, tools that see them, and bad input."""

import copy
import math
import pickle

import pytest
import torch
from scans import make_scan
from step_loop import (
    CELLS,
    EVERYTHING,
    LAYERS,
    SINGLE,
    B,
    H,
    I,
    T,
    make,
    make_input,
    options_of,
    randn,
    seeded,
)
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import functional

pytestmark = pytest.mark.filterwarnings("error:fastrnn")

# ---- Heads: parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_heads_keep_torchs_names_with_a_narrow_w_hh_and_no_gradient_between_heads(kind):
    stack = {} if kind.endswith("Cell") else {"num_layers": 2, "bidirectional": True}
    torch.manual_seed(0)
    plain = make(kind, **stack)
    torch.manual_seed(0)
    module = make(kind, heads=2, **stack)
    state = module.state_dict()
    assert list(state) == list(plain.state_dict())
    for name, w in plain.state_dict().items():
        if name.startswith("weight_hh"):
            assert state[name].shape == (len(w), H // 2)
            assert 0.3 < state[name].abs().max() <= 0.5
        else:
            assert torch.equal(state[name], w)
    fastrnn.init.orthogonal_(module)
    for name, w in module.named_parameters():
        if name.startswith("weight_hh"):
            for block in w.detach().split(H // 2):
                torch.testing.assert_close(block @ block.T, torch.eye(H // 2, dtype=torch.float64))
    module.reset_parameters()
    with pytest.raises(RuntimeError, match="weight_hh"):
        module.load_state_dict(plain.state_dict())


def test_heads_are_independent_of_each_other():
    module, x = make("GRU", heads=2), make_input("GRU")
    h = randn(1, B, H)
    jacobian = torch.autograd.functional.jacobian(lambda h: module(x, h)[1], h)[0, 0, :, 0, 0]
    assert (jacobian[: H // 2, : H // 2] != 0).all()
    assert (jacobian[: H // 2, H // 2 :] == 0).all()
    assert (jacobian[H // 2 :, : H // 2] == 0).all()


def test_heads_of_a_parametrized_weight_and_dropped_ones():
    class Doubled(nn.Module):
        def forward(self, w):
            return 2 * w

    module, x = make("LSTM", heads=2), make_input("LSTM")
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.weight_hh_l0.mul_(2)
    parametrize.register_parametrization(module, "weight_hh_l0", Doubled())
    torch.testing.assert_close(module(x), twin(x))
    dropped = make("LSTM", heads=2, weight_dropout=0.5)
    dropped.load_state_dict(twin.state_dict())
    torch.manual_seed(3)
    w = nn.functional.dropout(twin.weight_hh_l0, 0.5)
    torch.manual_seed(3)
    torch.testing.assert_close(dropped(x), functional_call(twin, {"weight_hh_l0": w}, (x,)))


# ---- Tools -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), EVERYTHING, ids=str)
def test_copies_pickles_and_states_carry_them(kind, options):
    module, x = make(kind, **options), make_input(kind)
    other = make(kind, **options)
    other.load_state_dict(module.state_dict())
    for twin in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(twin) == repr(module)
        torch.testing.assert_close(seeded(twin, x), seeded(module, x), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("kind", "option"), [(kind, name) for kind, options in EVERYTHING for name in options]
)
def test_to_torch_leaves_them_and_says_so(kind, option):
    module = make(kind, **{option: SINGLE[option]})
    with pytest.warns(UserWarning, match=rf"torch\.nn has no {option}={SINGLE[option]}"):
        fastrnn.to_torch(module)
    assert type(module) is getattr(fastrnn, kind)
    assert fastrnn.convert(module) is module
    assert f"{option}={SINGLE[option]}" in repr(module)


def test_prepack_refuses_heads_and_serves_the_others():
    with pytest.raises(ValueError, match=r"a weight of GRU is computed at each call .*heads"):
        fastrnn.prepack(make("GRU", heads=2).eval())
    for option in SINGLE.keys() - {"heads"}:
        module, x = make("LSTM", **{option: SINGLE[option]}).eval(), make_input("LSTM")
        expected = module(x)
        fastrnn.prepack(module)
        assert "prepacked" in fastrnn.explain(module, x)[0].forward
        with torch.no_grad():
            torch.testing.assert_close(module(x), expected)


# ---- Bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "option"),
    [(kind, name) for kind in LAYERS + CELLS for name in SINGLE if name not in options_of(kind)],
)
def test_options_that_make_no_sense_for_a_class_are_unknown_keywords(kind, option):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        make(kind, **{option: SINGLE[option]})


@pytest.mark.parametrize("option", ["zoneout", "recurrent_dropout", "variational_dropout"])
@pytest.mark.parametrize("p", [1.0, -0.1, math.nan, "0.5", None, True])
def test_probabilities_are_below_one(option, p):
    with pytest.raises(ValueError, match=rf"{option} should be a number in range \[0, 1\), got {p!r}"):
        make("LSTM", **{option: p})


CLIPS = [
    (name, v) for name in ("cell_clip", "state_gradient_clip") for v in (-1, 0, math.inf, math.nan, "1", True)
]


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        *(
            ("LSTM", {name: v}, ValueError, f"{name} should be None or a .* above 0, got {v!r}")
            for name, v in CLIPS
        ),
        ("LSTM", {"zoneout": (0.1, 1.5)}, ValueError, r"zoneout\[1\] should be a number .*, got 1.5"),
        ("LSTM", {"zoneout": (0.1,)}, ValueError, r"zoneout should be a number or two of them, got \(0.1,\)"),
        ("GRU", {"zoneout": (0.1, 0.1)}, ValueError, "zoneout should be one number for the one state h, got"),
        ("RNN", {"variational_dropout": (2, 0)}, ValueError, r"variational_dropout\[0\] should be .*got 2"),
        ("LSTM", {"heads": 3}, ValueError, "heads=3 should divide hidden_size=4"),
        ("GRUCell", {"heads": 8}, ValueError, "heads=8 should divide hidden_size=4"),
        ("LSTM", {"heads": 0}, ValueError, "heads should be an integer of at least 1, got 0"),
        ("LSTM", {"heads": 2.0}, ValueError, "heads should be an integer of at least 1, got 2.0"),
        ("LSTM", {"heads": 2, "proj_size": 2}, ValueError, "heads=2 cannot be combined with proj_size=2"),
        ("LSTM", {"reverse": 1}, TypeError, "reverse should be of type bool, got: int"),
        (
            "GRU",
            {"reverse": True, "bidirectional": True},
            ValueError,
            "reverse=True .* bidirectional=True",
        ),
    ],
)
def test_values_and_pairs_that_cannot_be_are_refused_at_construction(kind, options, error, message):
    with pytest.raises(error, match=message):
        make(kind, **options)


def test_an_option_that_a_cell_does_not_serve_is_refused_by_both_names(monkeypatch):
    cell = functional.CELLS["lstm_peephole"]
    monkeypatch.setitem(functional.CELLS, "lstm_peephole", copy.copy(cell))
    object.__setattr__(functional.CELLS["lstm_peephole"], "step", lambda x, a, states, *u: None)
    for option in ("cell_clip", "state_gradient_clip", "recurrent_dropout"):
        with pytest.raises(ValueError, match=rf"{option}=0.5 cannot be combined with peephole=True"):
            make("LSTM", peephole=True, **{option: 0.5})


@pytest.mark.parametrize(
    ("kind", "keywords", "error", "message"),
    [
        ("GRU", {"reset": None}, ValueError, "reset_to needs reset"),
        (
            "GRU",
            {"reset_to": torch.zeros(1, B, H + 1)},
            ValueError,
            r"\[1, 3, 4\] or \[T, L\*D, B, H\] = \[5, 1, 3, 4\]",
        ),
        ("GRU", {"reset_to": torch.zeros(T - 1, 1, B, H)}, ValueError, r"got \[4, 1, 3, 4\]"),
        ("GRU", {"reset_to": (torch.zeros(1, B, H),) * 2}, TypeError, "reset_to must be a tensor, got tuple"),
        (
            "LSTM",
            {"reset_to": torch.zeros(1, B, H)},
            TypeError,
            r"must be \(h, c\) as hx, got Tensor",
        ),
        (
            "LSTM",
            {"reset_to": (randn(1, B, H), randn(B, H))},
            ValueError,
            r"reset_to\[1\] .*got \[3, 4\]",
        ),
        ("GRU", {"reset_to": torch.zeros(1, B, H, dtype=torch.int64)}, RuntimeError, "not the same dtype"),
    ],
)
def test_reset_to_is_checked_at_each_call(kind, keywords, error, message):
    keywords = {"reset": torch.ones(T, B, dtype=torch.bool), "reset_to": randn(1, B, H)} | keywords
    with pytest.raises(error, match=message):
        make(kind)(randn(T, B, I), **keywords)


def test_reset_to_takes_no_packed_sequences():
    packed = pack_padded_sequence(randn(T, B, I), [T] * B)
    with pytest.raises(ValueError, match="reset_to and return_states take dense sequences"):
        make("GRU")(packed, reset_to=randn(1, B, H))


MASK = torch.ones(1, T * B, H, dtype=torch.bool)
OPERATOR = [
    ("gru", (2.0, 0, 0, 0), {}, "zoneout must be at most 1, got 2"),
    ("gru", (0, 0, -1.0, 0), {}, "numbers of options must not be negative, got -1"),
    ("gru", (0, 0, 0), {}, "expected 4 numbers of options, got 3"),
    ("gru", (0, 0.5, 0, 0), {}, "gru has no c for zoneout"),
    ("gru", (0, 0, 0.5, 0), {}, "gru takes no cell_clip"),
    ("slstm", (0, 0, 0, 0.5), {}, "slstm takes no state_gradient_clip"),
    ("gru", (1.0, 0, 0, 0), {0: MASK.double()}, "the masks of zoneout must be bool"),
    ("gru", (1.0, 0, 0, 0), {0: MASK[:, 1:]}, r"keep must be \[D, N, \*\] = \[1, 15, 4\], got \[1, 14, 4\]"),
    ("rnn_tanh", (0, 0, 0, 0), {2: MASK.double()}, "rnn_tanh takes no factor of the candidate"),
    ("gru", (0, 0, 0, 0), {2: MASK}, "candidate must have the dtype of h0"),
    ("indrnn_tanh", (0, 0, 0, 0), {3: randn(1, B, H)}, "indrnn_tanh has no product for a factor of h"),
    ("gru", (0, 0, 0, 0), {3: randn(1, B, H + 1)}, r"recurrent must be \[D, B, P\] = \[1, 3, 4\], got"),
    ("gru", (0, 0, 0, 0), {6: randn(1, B, H)}, "reset_to needs reset"),
    ("gru", (0, 0, 0, 0), {7: randn(1, B, H)}, "options must be those of their slots"),
]


@pytest.mark.parametrize(("name", "numbers", "tensors", "message"), OPERATOR)
def test_the_operator_refuses_what_a_cell_does_not_take_and_other_sizes(name, numbers, tensors, message):
    scan = make_scan(name, T, B, H)
    options = list(tensors.values()), sum(1 << slot for slot in tensors), [float(n) for n in numbers]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastrnn.scan.options(*scan.arguments(), *options)


def test_cells_without_units_have_nothing_to_act_on():
    for options in ({"zoneout": 0.5}, {"recurrent_dropout": 0.5}, {"cell_clip": 1.0}):
        assert fastrnn.LSTMCell(3, 0, **options)(torch.randn(2, 3))[0].shape == (2, 0)


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_options_that_are_off_leave_no_trace(kind):
    off = {"zoneout": 0, "recurrent_dropout": 0.0, "variational_dropout": (0, 0), "cell_clip": None}
    off |= {"state_gradient_clip": None, "heads": 1, "reverse": False}
    torch.manual_seed(0)
    ours = make(kind, **{name: off[name] for name in options_of(kind)})
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(I, H, dtype=torch.float64)
    assert vars(ours).keys() == vars(theirs).keys()
    assert repr(ours) == repr(theirs)
    torch.testing.assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()))
