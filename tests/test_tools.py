"""Tools that take torch.nn's modules take fastrnn's: tracers, exporters, counters, fakes, default devices."""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import fastrnn

KINDS = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]
LAYERS = KINDS[:3]


def make_pair(kind, *sizes, **options):
    theirs = getattr(nn, kind)(*(sizes or (3, 4)), **options)
    ours = getattr(fastrnn, kind)(*(sizes or (3, 4)), **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def make_input(kind, T=5, B=2, I=3):
    return torch.randn(*((B, I) if kind.endswith("Cell") else (T, B, I)))


def first(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.fixture
def forgotten_warnings():
    fastrnn.functional._warned.clear()
    yield
    fastrnn.functional._warned.clear()
    fastrnn.set_strict(False)


def fastrnns(caught):
    return [w for w in caught if str(w.message).startswith("fastrnn:")]


# ---- torch.jit.trace -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_computes_the_same_at_other_sizes_and_back_propagates(kind, grad):
    _, ours = make_pair(kind, 3, 4, **({} if kind.endswith("Cell") else {"num_layers": 2}))
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(ours, make_input(kind))
    x = make_input(kind, 7, 3).requires_grad_()
    torch.testing.assert_close(traced(x), ours(x))
    expected = torch.autograd.grad(first(ours(x)).square().sum(), [x, *ours.parameters()])
    got = torch.autograd.grad(first(traced(x)).square().sum(), [x, *traced.parameters()])
    torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_trace_needs_no_fastrnn(kind, tmp_path):
    _, ours = make_pair(kind)
    x = make_input(kind)
    torch.jit.trace(ours, x).save(tmp_path / "traced.pt")
    torch.save(x, tmp_path / "x.pt")
    script = (
        "import torch, sys; m = torch.jit.load('traced.pt'); y = m(torch.load('x.pt')); "
        "torch.save(y[0] if isinstance(y, tuple) else y, 'y.pt'); assert 'fastrnn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), first(ours(x)).detach())


class Packs(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, lengths):
        return self.rnn(pack_padded_sequence(x, lengths))[0].data


class Resets(Packs):
    def forward(self, x, reset):
        return self.rnn(x, reset=reset)[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LAYERS)
def test_packed_sequences_and_resets_are_traced(kind):
    _, ours = make_pair(kind, 3, 4, bidirectional=True)
    traced = torch.jit.trace(Packs(ours), (torch.randn(5, 2, 3), torch.tensor([5, 3])))
    x, lengths = torch.randn(6, 3, 3), torch.tensor([6, 4, 1])
    torch.testing.assert_close(traced(x, lengths), Packs(ours)(x, lengths))
    with torch.no_grad():
        traced = torch.jit.trace(Resets(ours), (torch.randn(5, 2, 3), torch.rand(5, 2) > 0.5))
        reset = torch.rand(5, 2) > 0.5
        x = torch.randn(5, 2, 3)
        torch.testing.assert_close(traced(x, reset), Resets(ours)(x, reset))
    torch.jit.trace(Resets(ours), (x, reset))  # its own check finds no difference


@pytest.mark.usefixtures("forgotten_warnings")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_says_that_it_holds_torchs_operators_and_strict_mode_refuses_it():
    _, ours = make_pair("GRU")
    x = make_input("GRU")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.jit.trace(ours, x)
    (said,) = fastrnns(caught)
    assert "torch.jit.trace" in str(said.message)
    assert said.filename == __file__
    assert not [w for w in caught if "fastrnn" in w.filename and w.category is torch.jit.TracerWarning]
    fastrnn.set_strict(True)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace.*strict"):
        torch.jit.trace(ours, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_jit_script_is_refused_by_name_and_taken_after_to_torch(kind):
    model = nn.Sequential(make_pair(kind)[1])
    with pytest.raises(RuntimeError, match=rf"fastrnn\.{kind}.*to_torch"):
        torch.jit.script(model)
    assert type(model[0]) is getattr(fastrnn, kind)
    x = make_input(kind)
    expected = model(x)
    torch.testing.assert_close(torch.jit.script(fastrnn.to_torch(model))(x), expected)


# ---- torch.fx ------------------------------------------------------------------------------------------


class Tagger(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.inner, self.rnn, self.out = nn.Linear(5, 3), rnn, nn.Linear(4, 2)

    def forward(self, x):
        y = self.rnn(input=self.inner(x))
        return self.out(y[0] if not isinstance(self.rnn, (nn.GRUCell, nn.RNNCell)) else y)


@pytest.mark.parametrize("kind", KINDS)
def test_in_a_graph_of_fx_a_module_is_a_leaf(kind):
    ours = make_pair(kind)[1]
    calls = []
    ours.register_forward_hook(lambda *_: calls.append(1))
    model = Tagger(ours)
    traced = torch.fx.symbolic_trace(model)
    assert not calls
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["inner", "rnn", "out"]
    x = make_input(kind, I=5)
    torch.testing.assert_close(traced(x), model(x))
    assert len(calls) == 2


def test_a_users_subclass_with_a_forward_of_its_own_is_traced_into():
    class Mine(fastrnn.GRU):
        def forward(self, x):
            return x + 1

    nodes = torch.fx.symbolic_trace(nn.Sequential(Mine(3, 4))).graph.nodes
    assert "call_module" not in [n.op for n in nodes]


# ---- FLOPs ---------------------------------------------------------------------------------------------


def count(module, x, grad_of_input, packed=False):
    x = x.clone().requires_grad_(grad_of_input)
    with FlopCounterMode(display=False) as counter:
        y = first(module(pack_padded_sequence(x, [5, 3]) if packed else x))
        forward = counter.get_total_flops()
        (y.data if packed else y).sum().backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"proj_size": 5}])
def test_flops_are_those_of_the_products(kind, packed, options):
    if "proj_size" in options and kind != "LSTM":
        pytest.skip("LSTM alone has a projection")
    ours = getattr(fastrnn, kind)(32, 64, **options)
    G, N = {"LSTM": 4, "GRU": 3}.get(kind, 1), 8 if packed else 10
    D, P, L = 1 + ("bidirectional" in options), options.get("proj_size", 64), options.get("num_layers", 1)
    inputs = [32, D * P][:L]
    projected = 64 * P if "proj_size" in options else 0
    each = sum(2 * N * D * (G * 64 * (I + P) + projected) for I in inputs)
    x = torch.randn(5, 2, 32)
    forward, backward = count(ours, x, True, packed)
    assert forward == each
    assert backward == 2 * each  # gradients of both factors of each product
    without_dx = 2 * N * D * G * 64 * 32
    assert count(ours, x, False, packed) == (each, 2 * each - without_dx)
    meta = copy.deepcopy(ours).to("meta")
    if not packed:
        assert count(meta, x.to("meta"), True) == (forward, backward)


@pytest.mark.parametrize("kind", ["GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_flops_of_the_forward_pass_are_torch_nns(kind):
    theirs, ours = make_pair(kind, 32, 64)
    x = make_input(kind, I=32)
    assert count(ours, x, True)[0] == count(theirs, x, True)[0]


def test_flops_of_a_prepacked_module_are_counted():
    ours = fastrnn.LSTM(32, 64, proj_size=5).eval()
    x = torch.randn(5, 2, 32)
    with torch.no_grad():
        counts = []
        for prepare in (lambda: None, lambda: fastrnn.prepack(ours)):
            prepare()
            with FlopCounterMode(display=False) as counter:
                ours(x)
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# ---- Fake tensors and default devices ------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
def test_fake_tensors_take_lengths_resets_and_packed_sequences(kind):
    data, sizes = torch.randn(8, 3), torch.tensor([2, 2, 2, 1, 1])
    with FakeTensorMode(allow_non_fake_inputs=True):
        ours = getattr(fastrnn, kind)(3, 4, 2, bidirectional=True)
        x = torch.randn(5, 2, 3)
        for lengths in ([3, 1], torch.tensor([3, 1]), torch.empty(2, dtype=torch.int32)):
            y, states = ours(x, lengths=lengths)
            assert y.shape == (5, 2, 8)
            assert {s.shape for s in tree_leaves(states)} == {(4, 2, 4)}
        y, _ = ours(x, reset=torch.zeros(5, 2, dtype=torch.bool), return_states=True)
        y.sum().backward()
        assert ours.weight_hh_l0.grad.shape == ours.weight_hh_l0.shape
        h = torch.zeros(4, 2, 4)
        hx = (h, h) if kind == "LSTM" else h
        y, _ = ours(PackedSequence(data, sizes))
        for packed in (y, ours(PackedSequence(torch.empty(8, 3), torch.tensor([2, 2, 2, 1, 1])), hx)[0]):
            assert packed.data.shape == (8, 8)
            packed.data.sum().backward()


@pytest.mark.parametrize("kind", LAYERS)
def test_on_meta_lengths_may_be_on_meta(kind):
    ours = getattr(fastrnn, kind)(3, 4, device="meta")
    x = torch.empty(5, 2, 3, device="meta")
    for lengths in ([3, 1], torch.empty(2, dtype=torch.int64, device="meta")):
        assert ours(x, lengths=lengths)[0].shape == (5, 2, 4)
        backwards = getattr(fastrnn, kind)(3, 4, device="meta", reverse=True)
        assert backwards(x, lengths=lengths)[0].shape == (5, 2, 4)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_default_device_changes_nothing(kind):
    """ "meta" stands for any device that is not the one of the tensors."""
    ours = getattr(fastrnn, kind)(3, 4, bidirectional=True, dtype=torch.float64)
    half = getattr(fastrnn, kind)(3, 4, bidirectional=True, dtype=torch.bfloat16)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    alone, v = x[:, 0], torch.randn(5, 2, 3, dtype=torch.float64)
    reset = torch.rand(5, 2) > 0.5
    sizes = torch.tensor([2, 2, 2, 1, 1])
    heard = []
    ours.register_state_gradient_hook(heard.append)

    def everything():
        heard.clear()
        calls = [
            lambda: ours(x, lengths=[5, 2])[0],
            lambda: ours(alone, lengths=2)[0],
            lambda: ours(x, reset=reset)[0],
            lambda: ours(PackedSequence(x[:4].flatten(0, 1), sizes))[0].data,
        ]
        results = []
        for call in calls:
            y = call()
            results += [y, *torch.autograd.grad(y.sin().sum(), [x, *ours.parameters()])]
        results += [t for h in heard for t in (*h.rows.places(), h.rows.ends())]
        results.append(half(x.bfloat16(), lengths=[5, 2], reset=reset, return_states=True)[0])
        twin = copy.deepcopy(ours)
        twin._state_hooks = None
        y = twin(PackedSequence(x[:4].flatten(0, 1), sizes))[0].data
        (g,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        results += torch.autograd.grad(g.sum(), list(twin.parameters()), allow_unused=True)
        results.append(torch.func.jvp(lambda x: twin(x, lengths=[5, 2])[0], (x,), (v,))[1])
        return [t for t in results if t is not None]

    expected = everything()
    with torch.device("meta"):
        got = everything()
    torch.testing.assert_close(got, expected)


# ---- Weights that users write -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_written_into_flat_weights_has_the_effect_that_it_has_in_torch_nn(kind):
    def write_list(m):
        m._flat_weights = [w.detach() * 0.5 for w in m._flat_weights]

    def write_entry(m):
        m._flat_weights[1] = m._flat_weights[1].detach() * 0.5

    def set_tensor(m):
        w = m.weight_hh_l0
        del m.weight_hh_l0
        m.weight_hh_l0 = w.detach() * 0.5

    def set_then_write(m):
        set_tensor(m)
        m(x)
        write_entry(m)

    def write_then_set(m):
        write_list(m)
        set_tensor(m)

    def delete(m):
        del m.weight_hh_l0

    def write_and_load(m):
        write_list(m)
        m.load_state_dict(m.state_dict())

    def write_and_move(m):
        write_list(m)
        m.double().float()

    x = make_input(kind)
    ways = [write_list, write_entry, set_tensor, set_then_write, write_then_set, delete, write_and_load,
            write_and_move]  # fmt: skip
    for way in ways:
        theirs, ours = make_pair(kind, 3, 4, 2)
        unchanged = ours(x)[0]
        for module in (theirs, ours):
            way(module)
        torch.testing.assert_close(ours(x), theirs(x), msg=lambda text, way=way: f"{way.__name__}: {text}")
        effect = not torch.equal(ours(x)[0], unchanged)
        assert effect == (way.__name__ not in ("delete", "write_and_move"))


@pytest.mark.parametrize("kind", LAYERS)
def test_dropped_weights_reach_the_raw_ones(kind):
    """AWD-LSTM: before each call the attribute becomes a tensor that dropout has made of a parameter."""
    results = []
    for module in make_pair(kind, 3, 4, 2):
        raw = nn.Parameter(module.weight_hh_l1.detach().clone())
        del module.weight_hh_l1
        optimizer = torch.optim.SGD([raw, *module.parameters()], 0.1)
        torch.manual_seed(1)
        x = make_input(kind)
        for _ in range(3):
            module.weight_hh_l1 = torch.dropout(raw, 0.5, True)
            optimizer.zero_grad()
            module(x)[0].square().sum().backward()
            optimizer.step()
        results.append([raw, raw.grad, *module.parameters()])
    torch.testing.assert_close(results[1], results[0])


def test_a_weight_that_is_computed_is_computed_once_a_call():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.n = 0

        def forward(self, w):
            self.n += 1
            return w * 2

    ours = fastrnn.LSTM(3, 4)
    nn.utils.parametrize.register_parametrization(ours, "weight_ih_l0", Counts())
    x = make_input("LSTM")
    ours(x)
    counter = ours.parametrizations.weight_ih_l0[0]
    before = counter.n
    ours(x)
    assert counter.n == before + 1
    copy.deepcopy(ours)(x)


def test_functional_call_may_change_the_dtype():
    ours = fastrnn.GRU(3, 4)
    weights = {k: v.double() for k, v in ours.named_parameters()}
    assert functional_call(ours, weights, (make_input("GRU").double(),))[0].dtype == torch.float64
    assert ours(make_input("GRU"))[0].dtype == torch.float32


# ---- Names and warnings --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_messages_have_torch_nns_class_names_for_parametrized_modules_too(kind):
    weight = "weight_hh" if kind.endswith("Cell") else "weight_hh_l0"
    said = []
    for module in make_pair(kind):
        with pytest.raises(ValueError, match=kind) as caught:
            parametrizations.weight_norm(module, weight)(torch.randn(1, 2, 3, 3))
        said.append(str(caught.value))
    assert said[0] == said[1]


@pytest.mark.usefixtures("forgotten_warnings")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("without_16_bit_kernels")
def test_a_warning_points_at_the_line_of_the_caller(kind):
    ours = getattr(fastrnn, kind)(3, 4, dtype=torch.bfloat16)
    model = nn.Sequential(ours)
    x = make_input(kind).bfloat16()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.no_grad()(model)(x)
    (said,) = fastrnns(caught)
    assert said.filename == __file__
    assert "torch.no_grad()(model)(x)" in Path(__file__).read_text().splitlines()[said.lineno - 1]


def test_the_warning_that_a_pack_is_undone_points_there_too():
    ours = fastrnn.prepack(fastrnn.GRU(3, 4).eval())
    with pytest.warns(UserWarning, match="prepack") as caught:
        nn.Sequential(ours)(make_input("GRU"))
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantize_dynamic_says_what_it_leaves_and_takes_it_after_to_torch():
    quantize_dynamic = torch.ao.quantization.quantize_dynamic
    model = nn.ModuleDict({"rnn": fastrnn.LSTM(3, 4), "cell": fastrnn.GRUCell(3, 4)}).eval()
    with pytest.warns(UserWarning, match=r"fastrnn\.(LSTM|GRUCell).*to_torch") as caught:
        quantized = quantize_dynamic(model, {nn.LSTM, nn.GRUCell})
    assert {w.filename for w in fastrnns(caught)} == {__file__}
    assert type(quantized["rnn"]) is fastrnn.LSTM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = quantize_dynamic(fastrnn.to_torch(model), {nn.LSTM, nn.GRUCell})
    assert all("quantized" in type(m).__module__ for m in quantized.values())


# ---- Pickles in a process that has not imported fastrnn ------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickled_module_is_loaded_where_fastrnn_is_not_imported_yet(kind, tmp_path):
    _, ours = make_pair(kind)
    torch.save(ours, tmp_path / "m.pt")
    script = f"""
import torch
module = torch.load("m.pt", weights_only=False)
assert type(module).__module__ == "fastrnn.modules", type(module)
try:
    torch.load("m.pt")
except Exception as error:
    assert "fastrnn.modules.{kind}" in str(error), error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    with torch.serialization.safe_globals([type(ours)]):
        twin = torch.load(tmp_path / "m.pt")
    x = make_input(kind)
    torch.testing.assert_close(twin(x), ours(x))
