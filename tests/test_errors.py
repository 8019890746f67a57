"""Bad input: what torch.nn refuses is refused with the same exception, in its words where they count."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn

NAN = float("nan")


def outcome(action):
    """(exception type or None, its first line)"""
    try:
        action()
    except Exception as error:
        return type(error), str(error).split("\n")[0]
    return None, ""


def compare(ours, theirs, same_words=True):
    our_type, our_words = ours
    their_type, their_words = theirs
    assert their_type is not None, "torch.nn takes this: it is no bad call"
    assert our_type is their_type, f"{our_type} {our_words!r}, torch.nn {their_type} {their_words!r}"
    if same_words:
        assert our_words == their_words


# ---- Construction ------------------------------------------------------------------------------------

CONSTRUCTIONS = {
    "NaN dropout": lambda c: c(3, 4, 2, dropout=NAN),
    "negative dropout": lambda c: c(3, 4, 2, dropout=-0.1),
    "dropout above one": lambda c: c(3, 4, 2, dropout=1.5),
    "boolean dropout": lambda c: c(3, 4, 2, dropout=True),
    "dropout in words": lambda c: c(3, 4, 2, dropout="0.5"),
    "no hidden units": lambda c: c(3, 0),
    "negative hidden size": lambda c: c(3, -4),
    "fractional hidden size": lambda c: c(3, 4.5),
    "no layers": lambda c: c(3, 4, 0),
    "negative input size": lambda c: c(-3, 4),
    "negative projection": lambda c: c(3, 4, proj_size=-1),
    "projection as wide as the hidden size": lambda c: c(3, 4, proj_size=4),
    "unknown option": lambda c: c(3, 4, colour="red"),
    "integer weights": lambda c: c(3, 4, dtype=torch.int32),
    "no arguments": lambda c: c(),
}


@pytest.mark.parametrize("case", CONSTRUCTIONS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_construction_that_torch_nn_refuses_is_refused_in_its_words(kind, case):
    build = CONSTRUCTIONS[case]
    theirs = outcome(lambda: build(getattr(nn, kind)))
    if theirs[0] is None:
        pytest.skip("torch.nn takes this")
    compare(outcome(lambda: build(getattr(fastrnn, kind))), theirs, same_words=case != "unknown option")


@pytest.mark.parametrize("kind", ["GRU", "RNN"])
def test_only_an_lstm_has_a_projection(kind):
    compare(
        outcome(lambda: getattr(fastrnn, kind)(3, 4, proj_size=2)),
        outcome(lambda: getattr(nn, kind)(3, 4, proj_size=2)),
    )


def test_an_unknown_nonlinearity_is_named():
    for construct in (lambda c: c.RNN(3, 4, nonlinearity="gelu"),):
        compare(outcome(lambda c=construct: c(fastrnn)), outcome(lambda c=construct: c(nn)))
    x = torch.randn(2, 3)
    compare(
        outcome(lambda: fastrnn.RNNCell(3, 4, nonlinearity="gelu")(x)),
        outcome(lambda: nn.RNNCell(3, 4, nonlinearity="gelu")(x)),
    )


# ---- Calls -------------------------------------------------------------------------------------------


def states(kind, h, c=None):
    return (h, h if c is None else c) if kind.startswith("LSTM") else h


def x3(*shape):
    return torch.zeros(*(shape or (5, 2, 3)))


CALLS = {
    "wrong input size": lambda m, k: m(x3(5, 2, 4)),
    "1-D input": lambda m, k: m(x3(3)),
    "4-D input": lambda m, k: m(x3(1, 5, 2, 3)),
    "float64 input": lambda m, k: m(x3().double()),
    "integer input": lambda m, k: m(x3().long()),
    "half input": lambda m, k: m(x3().half()),
    "no input": lambda m, k: m(),
    "input is a list": lambda m, k: m([1.0, 2.0]),
    "input is None": lambda m, k: m(None),
    "T = 0": lambda m, k: m(x3(0, 2, 3)),
    "state of a wrong batch": lambda m, k: m(x3(), states(k, x3(1, 3, 4))),
    "state of a wrong width": lambda m, k: m(x3(), states(k, x3(1, 2, 5))),
    "state of wrong layers": lambda m, k: m(x3(), states(k, x3(2, 2, 4))),
    "2-D state for batched input": lambda m, k: m(x3(), states(k, x3(2, 4))),
    "3-D state for unbatched input": lambda m, k: m(x3(5, 3), states(k, x3(1, 1, 4))),
    "state of a wrong width, unbatched": lambda m, k: m(x3(5, 3), states(k, x3(1, 5))),
    "float64 state": lambda m, k: m(x3(), states(k, x3(1, 2, 4).double())),
    "state on another device": lambda m, k: m(x3(), states(k, x3(1, 2, 4).to("meta"))),
    "input on another device": lambda m, k: m(x3().to("meta")),
}
# Where torch's own words are those of a Python or C++ accident, only the type must be the same.
ACCIDENTS = {"input is a list", "input is None", "input on another device", "no input", "float64 state"}


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_call_that_torch_nn_refuses_is_refused_in_its_words(kind, case):
    modules = [getattr(library, kind)(3, 4) for library in (fastrnn, nn)]
    results = [outcome(lambda m=module: CALLS[case](m, kind)) for module in modules]
    compare(*results, same_words=case not in ACCIDENTS)


LSTM_CALLS = {
    "c of another shape": lambda m: m(x3(), (x3(1, 2, 4), x3(1, 2, 5))),
    "c of another batch": lambda m: m(x3(), (x3(1, 2, 4), x3(1, 3, 4))),
    "c of another rank": lambda m: m(x3(), (x3(1, 2, 4), x3(2, 4))),
    "h without c": lambda m: m(x3(), x3(1, 2, 4)),
    "c in float64": lambda m: m(x3(), (x3(1, 2, 4), x3(1, 2, 4).double())),
}


@pytest.mark.parametrize("case", LSTM_CALLS)
def test_a_bad_pair_of_states_is_refused_as_by_torch_nn(case):
    compare(
        outcome(lambda: LSTM_CALLS[case](fastrnn.LSTM(3, 4))),
        outcome(lambda: LSTM_CALLS[case](nn.LSTM(3, 4))),
        same_words=case not in ("h without c", "c in float64"),
    )


def test_a_projected_state_must_have_the_width_of_the_projection():
    for wrong in ((x3(1, 2, 4), x3(1, 2, 4)), (x3(1, 2, 2), x3(1, 2, 2))):
        compare(
            outcome(lambda w=wrong: fastrnn.LSTM(3, 4, proj_size=2)(x3(), w)),
            outcome(lambda w=wrong: nn.LSTM(3, 4, proj_size=2)(x3(), w)),
        )


CELL_CALLS = {
    "wrong input size": lambda m, k: m(x3(2, 4)),
    "3-D input": lambda m, k: m(x3(1, 2, 3)),
    "state of a wrong batch": lambda m, k: m(x3(2, 3), states(k, x3(3, 4))),
    "state of a wrong width": lambda m, k: m(x3(2, 3), states(k, x3(2, 5))),
    "3-D state": lambda m, k: m(x3(2, 3), states(k, x3(1, 2, 4))),
    "float64 input": lambda m, k: m(x3(2, 3).double()),
    "float64 state": lambda m, k: m(x3(2, 3), states(k, x3(2, 4).double())),
    "input is None": lambda m, k: m(None),
}
CELL_ACCIDENTS = {"float64 input", "float64 state", "input is None"}


@pytest.mark.parametrize("case", CELL_CALLS)
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_a_cell_refuses_what_torch_nns_cell_refuses(kind, case):
    modules = [getattr(library, kind)(3, 4) for library in (fastrnn, nn)]
    results = [outcome(lambda m=module: CELL_CALLS[case](m, kind)) for module in modules]
    compare(*results, same_words=case not in CELL_ACCIDENTS)


# ---- Packed sequences --------------------------------------------------------------------------------


def packed(batch_sizes, I=3):
    batch_sizes = torch.tensor(batch_sizes)
    return PackedSequence(torch.zeros(int(batch_sizes.sum()), I), batch_sizes)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_an_empty_packed_batch_is_refused(kind):
    empty = PackedSequence(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    modules = [getattr(library, kind)(3, 4) for library in (fastrnn, nn)]
    compare(*(outcome(lambda m=module: m(empty)) for module in modules))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("case", ["input size", "state batch", "state width"])
def test_a_bad_packed_call_is_refused_as_by_torch_nn(kind, case):
    results = []
    for library in (fastrnn, nn):
        module = getattr(library, kind)(3, 4)
        sequence = packed([2, 2, 1], 5 if case == "input size" else 3)
        state = {"input size": None, "state batch": x3(1, 3, 4), "state width": x3(1, 2, 5)}[case]
        results.append(outcome(lambda: module(sequence, None if state is None else states(kind, state))))  # noqa: B023
    compare(*results, same_words=kind != "LSTM")  # torch's packed LSTM checks nothing before it fails


@pytest.mark.parametrize("batch_sizes", [[1, 2], [2, 0], [2, -1], [3, 3, 2]])
def test_batch_sizes_that_make_no_sequence_are_refused(batch_sizes):
    """A PackedSequence made by hand; torch.nn reads out of bounds or gives nonsense for some of these."""
    rows = 8 if batch_sizes == [3, 3, 2] else max(sum(batch_sizes), 0)
    rows += batch_sizes == [3, 3, 2]  # one more than they add up to
    sequence = PackedSequence(torch.zeros(rows, 3), torch.tensor(batch_sizes))
    with pytest.raises(RuntimeError, match="batch_sizes"):
        fastrnn.GRU(3, 4)(sequence)


# ---- Checkpoints -------------------------------------------------------------------------------------


def foreign(state, case):
    if case == "missing":
        del state["weight_hh_l0"]
    elif case == "unexpected":
        state["weight_xx"] = torch.zeros(1)
    elif case == "wrong shape":
        state["weight_hh_l0"] = torch.zeros(3, 3)
    elif case == "not a tensor":
        state["bias_hh_l0"] = "corrupted"
    return state


@pytest.mark.parametrize("case", ["missing", "unexpected", "wrong shape", "not a tensor"])
def test_a_foreign_checkpoint_is_refused_in_torch_nns_words(case):
    torch.manual_seed(0)
    results = []
    for library in (fastrnn, nn):
        module = library.LSTM(3, 4)
        state = foreign({k: v.clone() for k, v in module.state_dict().items()}, case)
        results.append(outcome(lambda m=module, s=state: m.load_state_dict(s)))
        module(x3())  # and the module still works
    compare(*results)


# ---- Nothing half-changed ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_refused_call_changes_nothing(kind, case):
    torch.manual_seed(0)
    module = getattr(fastrnn, kind)(3, 4, 1)
    x = torch.randn(5, 2, 3)
    expected = module(x)[0]
    parameters = [(p, p.clone(), p._version) for p in module.parameters()]
    keys = set(module.__dict__)
    random_state = torch.random.get_rng_state()
    assert outcome(lambda: CALLS[case](module, kind))[0] is not None
    for parameter, copy, version in parameters:
        assert torch.equal(parameter, copy)
        assert parameter._version == version
        assert parameter.grad is None
    assert set(module.__dict__) == keys
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert torch.equal(module(x)[0], expected)


# ---- Operators ---------------------------------------------------------------------------------------

OPERATOR = {
    "h0": (torch.zeros(3, 2, 4), r"h0 must be \[D, B, P\] = \[1, 2, 4\], got \[3, 2, 4\]"),
    "c0": (torch.zeros(1, 2, 5), r"c0 must be \[D, B, H\] = \[1, 2, 4\], got \[1, 2, 5\]"),
    "w_hh": ([torch.zeros(16, 5)], r"w_hh must be \[G\*H, P\] = \[16, 4\], got \[16, 5\]"),
    "b_hh": ([torch.zeros(15)], r"b_hh must be \[G\*H\] = \[16\], got \[15\]"),
    "w_hr": ([torch.zeros(4, 3)], r"w_hr must be"),
    "batch_sizes": (torch.tensor([3, 3, 4]), "batch_sizes"),
    "lengths": (torch.tensor([1, 9]), "lengths"),
    "reset": (torch.zeros(3, dtype=torch.bool), "reset"),
}


@pytest.mark.parametrize("argument", OPERATOR)
def test_the_operator_names_the_argument_and_both_values(argument):
    from scans import make_scan

    scan = make_scan("lstm", 5, 2, 4, dtype=torch.float32)
    value, words = OPERATOR[argument]
    setattr(scan, argument, value)
    with pytest.raises(RuntimeError, match=words):
        scan.kernel()


@pytest.mark.parametrize("name", ["w_hh", "b_hh", "c0", "x"])
def test_the_operator_refuses_mixed_dtypes(name):
    from scans import make_scan

    scan = make_scan("lstm", 5, 2, 4)
    value = getattr(scan, name)
    setattr(scan, name, [v.float() for v in value] if isinstance(value, list) else value.float())
    with pytest.raises(RuntimeError, match=re.escape(name) + " must have the dtype"):
        scan.kernel()


def test_the_operator_refuses_half_precision():
    from scans import make_scan

    with pytest.raises(RuntimeError, match="float32 and float64"):
        make_scan("gru", 5, 2, 4, dtype=torch.bfloat16).kernel()


def test_packing_itself_is_torchs_and_refuses_as_ever():
    with pytest.raises(RuntimeError, match="greater than 0"):
        pack_padded_sequence(torch.zeros(3, 2, 3), torch.tensor([3, 0]))
