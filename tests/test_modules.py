"""fastrnn's modules are torch.nn's: the same numbers and tools, and weights that are read at each call."""

import copy
import ctypes
import io
import itertools
import multiprocessing
import pickle
import sys
import threading
import unittest
import warnings
from types import ModuleType

import parity
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

import fastrnn

KINDS = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]
SWEEP = 400


def make_pair(kind="LSTM", I=3, H=4, dtype=torch.float64, **options):
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(I, H, dtype=dtype, **options)
    ours = getattr(fastrnn, kind)(I, H, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def make_input(kind="LSTM", T=5, B=2, I=3, dtype=torch.float64):
    return torch.randn(*((B, I) if kind.endswith("Cell") else (T, B, I)), dtype=dtype)


def first(result):
    return result[0] if isinstance(result, tuple) else result


def assert_same(ours, theirs, x):
    torch.testing.assert_close(ours(x), theirs(x))


# ---- Parity ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", range(SWEEP // 20))
def test_random_configurations_equal_torch_nn(chunk):
    """Outputs, states and every gradient, in float64; parity.draw says what a configuration is."""
    different = {}
    for seed in range(20 * chunk, 20 * chunk + 20):
        config = parity.draw(1_000_000 + seed)
        if found := parity.check(config):
            different[config] = found
    assert not different


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize(("T", "B", "H"), [(50, 1, 64), (50, 8, 64), (20, 16, 200)])
def test_float32_is_as_close_to_float64_as_torch_nn_is(kind, T, B, H):
    exact, _ = make_pair(kind, 16, H)
    x = make_input(kind, T, B, 16)

    def run(module, dtype):
        module = module.to(dtype)
        leaf = x.to(dtype).requires_grad_()
        y = module(leaf)[0]
        gradients = torch.autograd.grad(y.square().mean(), [leaf, *module.parameters()])
        return [y.detach(), *gradients]

    ours = getattr(fastrnn, kind)(16, H)
    ours.load_state_dict(exact.state_dict())
    # float32 sees rounded weights; the truth must see the same ones.
    exact.load_state_dict({k: v.float().double() for k, v in exact.state_dict().items()})
    x = x.float().double()
    truth = run(exact, torch.float64)
    got = run(ours, torch.float32)
    theirs = run(exact, torch.float32)
    for t, o, p in zip(truth, got, theirs, strict=True):
        scale = t.abs().mean()
        assert (o - t).abs().mean() <= 2 * (p - t).abs().mean() + 1e-7 * scale
        assert (o - t).abs().max() <= 3 * (p - t).abs().max() + 1e-6 * t.abs().max()


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_dropout_draws_torch_nns_random_numbers(kind, batch_first, packed):
    theirs, ours = make_pair(kind, num_layers=3, dropout=0.5, batch_first=batch_first, bidirectional=True)
    x = torch.randn(6, 7, 3, dtype=torch.float64)
    if packed:
        lengths = torch.randint(1, 7, (x.shape[0 if batch_first else 1],))
        x = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
    results = []
    for module in (theirs, ours):
        torch.manual_seed(5)
        y = module(x)[0]
        results.append((y.data if packed else y, torch.rand(3)))
    torch.testing.assert_close(results[1], results[0])


def test_nan_and_infinity_in_the_input_travel_as_in_torch_nn():
    for kind in KINDS:
        for value in (float("nan"), float("inf"), -float("inf")):
            theirs, ours = make_pair(kind)
            x = make_input(kind)
            x.view(-1)[4] = value
            for a, b in zip(tree_leaves(ours(x)), tree_leaves(theirs(x)), strict=True):
                torch.testing.assert_close(a, b, equal_nan=True)


def module_samples():
    """torch's own samples for its recurrent modules; they import a helper that no user needs."""
    if "expecttest" not in sys.modules:
        try:
            import expecttest  # noqa: F401
        except ModuleNotFoundError:
            stub = ModuleType("expecttest")
            stub.TestCase = unittest.TestCase
            stub.assert_expected_inline = None
            sys.modules["expecttest"] = stub
    from torch.testing._internal.common_modules import module_db

    return [
        info
        for info in module_db
        if info.module_cls in (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_torchs_own_module_samples_pass(kind, training):
    (info,) = [info for info in module_samples() if info.module_cls is getattr(nn, kind)]
    samples = info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
    )
    assert len(samples) > 1
    for sample in samples:
        made = sample.constructor_input
        theirs = getattr(nn, kind)(*made.args, **made.kwargs).double().train(training)
        ours = getattr(fastrnn, kind)(*made.args, **made.kwargs).double().train(training)
        ours.load_state_dict(theirs.state_dict())
        call = sample.forward_input
        torch.manual_seed(0)
        expected = theirs(*call.args, **call.kwargs)
        torch.manual_seed(0)
        got = ours(*call.args, **call.kwargs)
        leaves = [tree_leaves(r) for r in (got, expected)]
        leaves = [[t.data if hasattr(t, "batch_sizes") else t for t in r] for r in leaves]
        torch.testing.assert_close(*leaves)
        losses = [sum(t.sum() for t in r if t.is_floating_point()) for r in leaves]
        gradients = [
            torch.autograd.grad(loss, list(m.parameters()), allow_unused=True)
            for loss, m in zip(losses, (ours, theirs), strict=True)
        ]
        torch.testing.assert_close(*gradients)


def test_classic_training_loop_learns_what_torch_nn_learns():
    losses = []
    for library in (nn, fastrnn):
        torch.manual_seed(0)
        lstm, head = library.LSTM(4, 16, batch_first=True), nn.Linear(16, 1)
        optimizer = torch.optim.Adam([*lstm.parameters(), *head.parameters()], lr=0.02)
        x = torch.randn(32, 10, 4)
        target = x.sum((1, 2), keepdim=True).squeeze(1).sign()
        history = []
        for _ in range(30):
            optimizer.zero_grad()
            y, _ = lstm(x)
            loss = nn.functional.mse_loss(head(y[:, -1]), target)
            loss.backward()
            nn.utils.clip_grad_norm_(lstm.parameters(), 1.0)
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    assert losses[1][-1] < 0.5 * losses[1][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-3)


# ---- torch.nn's tools --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_is_torch_nns_class_with_torch_nns_signature_and_text(kind):
    theirs, ours = make_pair(kind)
    assert isinstance(ours, getattr(nn, kind))
    assert repr(ours) == repr(theirs)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]


@pytest.mark.parametrize("kind", KINDS)
def test_initial_weights_are_torch_nns_under_the_same_seed(kind):
    torch.manual_seed(3)
    theirs = getattr(nn, kind)(3, 4)
    torch.manual_seed(3)
    ours = getattr(fastrnn, kind)(3, 4)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_go_both_ways(kind):
    theirs, ours = make_pair(kind)
    x = make_input(kind)
    for parameter in ours.parameters():
        parameter.data.normal_()
    theirs.load_state_dict(ours.state_dict())
    assert_same(ours, theirs, x)
    theirs.load_state_dict({k: v * 0.5 for k, v in theirs.state_dict().items()})
    ours.load_state_dict(theirs.state_dict(), assign=True)
    assert_same(ours, theirs, x)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same_and_are_independent(kind, way):
    _, ours = make_pair(kind)
    x = make_input(kind)
    if way == "deepcopy":
        twin = copy.deepcopy(ours)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(ours))
    else:
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert type(twin) is type(ours)
    before = first(ours(x)).clone()
    torch.testing.assert_close(twin(x), ours(x))
    with torch.no_grad():
        twin.get_parameter(next(iter(dict(twin.named_parameters())))).add_(1)
    assert not torch.equal(first(twin(x)), before)
    assert torch.equal(first(ours(x)), before)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_uses_the_parameters_that_it_is_given(kind):
    theirs, ours = make_pair(kind)
    other = {k: torch.randn_like(v) for k, v in ours.named_parameters()}
    x = make_input(kind)
    torch.testing.assert_close(functional_call(ours, other, (x,)), functional_call(theirs, other, (x,)))
    assert_same(ours, theirs, x)


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("name", PARAMETRIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_parametrized_weights_take_effect_and_get_gradients(kind, name):
    weight = "weight_hh" if kind.endswith("Cell") else "weight_hh_l0"
    results = []
    for module in make_pair(kind):
        torch.manual_seed(1)
        PARAMETRIZATIONS[name](module, weight)
        # In training, spectral norm's estimate moves at every read, and torch.nn reads the weight more often.
        module.train(name != "spectral_norm")
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        x = make_input(kind)
        for _ in range(3):
            loss = first(module(x)).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append([first(module(x)), *(p.detach() for p in module.parameters())])
        assert parametrize.is_parametrized(module, weight)
    torch.testing.assert_close(results[1], results[0])


class Counted(nn.Module):
    calls = 0

    def forward(self, weight):
        self.calls += 1
        return weight


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_computes_each_parametrized_weight_once(kind, packed, training):
    _, ours = make_pair(kind)
    ours.train(training)
    names = [name for name, _ in ours.named_parameters()]
    for name in names:
        parametrize.register_parametrization(ours, name, Counted())
    counters = [module for module in ours.modules() if isinstance(module, Counted)]
    for counter in counters:
        counter.calls = 0
    x = make_input(kind)
    if packed and not kind.endswith("Cell"):
        x = pack_padded_sequence(x, torch.tensor([5, 3]))
    ours(x)
    ours.train(training)
    assert [counter.calls for counter in counters] == [1] * len(names)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_the_older_weight_norm_takes_effect(kind):
    weight = "weight_hh" if kind.endswith("Cell") else "weight_hh_l0"
    results = []
    for module in make_pair(kind):
        torch.nn.utils.weight_norm(module, weight)
        with torch.no_grad():
            getattr(module, weight + "_g").mul_(0.3)
        x = torch.ones_like(make_input(kind))
        y = first(module(x))
        y.sum().backward()
        results.append([y, getattr(module, weight + "_v").grad])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_run(kind):
    _, ours = make_pair(kind)
    seen = []
    ours.register_forward_pre_hook(lambda m, args: seen.append("before"))
    ours.register_forward_hook(lambda m, args, out: seen.append("after"))
    ours.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    x = make_input(kind).requires_grad_()
    first(ours(x)).sum().backward()
    assert seen == ["before", "after", "backward"]


def test_a_forward_hook_may_replace_the_result():
    _, ours = make_pair("GRU")
    ours.register_forward_hook(lambda m, args, out: (out[0] * 2, out[1]))
    plain = copy.deepcopy(ours)
    plain._forward_hooks.clear()
    x = make_input()
    torch.testing.assert_close(ours(x)[0], 2 * plain(x)[0])


def test_replicas_with_plain_tensors_as_parameters_work():
    """What DataParallel makes: a shallow copy whose parameters are tensors with a history."""
    theirs, ours = make_pair(num_layers=2)
    x = make_input()
    results = []
    for module in (theirs, ours):
        replica = module._replicate_for_data_parallel()
        for name, parameter in module.named_parameters():
            setattr(replica, name, parameter * 1.0)
        if module is theirs:
            replica._flat_weights = [getattr(replica, n) for n in replica._flat_weights_names]
        replica(x)[0].sum().backward()
        results.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(results[1], results[0])


def test_moves_to_another_dtype_and_back():
    theirs, ours = make_pair("LSTM", dtype=torch.float32)
    for dtype in (torch.float64, torch.float32):
        x = make_input(dtype=dtype)
        assert_same(ours.to(dtype), theirs.to(dtype), x)


def test_on_the_meta_device_shapes_are_torch_nns():
    theirs = nn.LSTM(3, 4, 2, bidirectional=True, device="meta")
    ours = fastrnn.LSTM(3, 4, 2, bidirectional=True, device="meta")
    x = torch.empty(5, 2, 3, device="meta")
    for a, b in zip(tree_leaves(ours(x)), tree_leaves(theirs(x)), strict=True):
        assert (a.shape, a.device) == (b.shape, b.device)


# ---- Cells as functions --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
@pytest.mark.parametrize("given", [(False, False), (True, False), (False, True), (True, True)])
def test_a_functional_cell_takes_each_bias_by_itself(name, given):
    gates = {"lstm": 4, "gru": 3}.get(name, 1)
    x, h = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    hx = (h, torch.randn(2, 4, dtype=torch.float64)) if name == "lstm" else h
    weights = [torch.randn(gates * 4, n, dtype=torch.float64, requires_grad=True) for n in (3, 4)]
    biases = [torch.randn(gates * 4, dtype=torch.float64, requires_grad=True) if g else None for g in given]
    leaves = [t for t in (*weights, *biases) if t is not None]
    results = []
    for library in (torch, fastrnn.functional):
        out = tree_leaves(getattr(library, f"{name}_cell")(x, hx, *weights, *biases))
        results.append((out, torch.autograd.grad(sum(t.square().sum() for t in out), leaves)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("bias", ["bias_ih", "bias_hh"])
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_a_cell_may_lose_one_of_its_biases(kind, bias):
    theirs, ours = make_pair(kind)
    x = make_input(kind)
    expected = fastrnn.convert(copy.deepcopy(theirs))(x)
    for module in (theirs, ours):
        setattr(module, bias, None)
    assert_same(ours, theirs, x)
    assert not torch.equal(first(ours(x)), first(expected))
    fastrnn.explain(ours, x)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_a_cell_without_units_gives_what_torch_nns_gives(kind):
    theirs, ours = make_pair(kind, 3, 0)
    x, h = make_input(kind), torch.zeros(2, 0, dtype=torch.float64)
    for state in (None, (h, h) if kind == "LSTMCell" else h):
        torch.testing.assert_close(ours(x, state), theirs(x, state))
    first(ours(x)).sum().backward()
    assert fastrnn.explain(ours, x)[0].operator is None


# ---- Every way of changing a weight takes effect at the next call ---------------------------------------


def by_optimizer(module, w):
    w.grad = torch.ones_like(w)
    torch.optim.SGD([w], lr=0.5).step()


def in_place(module, w):
    with torch.no_grad():
        w.sub_(0.5)


def by_data(module, w):
    w.data.sub_(0.5)


def by_replaced_data(module, w):
    w.data = w.data - 0.5


def by_numpy(module, w):
    view = w.detach().numpy()
    view -= 0.5


def by_address(module, w):
    array = (ctypes.c_double * w.numel()).from_address(w.data_ptr())
    for i in range(w.numel()):
        array[i] -= 0.5


def by_state_dict(module, w):
    state = module.state_dict()
    module.load_state_dict({k: v - 0.5 if k.startswith("weight_hh") else v for k, v in state.items()})


def by_replacement(module, w):
    name = "weight_hh_l0" if hasattr(module, "weight_hh_l0") else "weight_hh"
    setattr(module, name, nn.Parameter(w.detach() - 0.5))


def by_storage(module, w):
    with torch.no_grad():
        w.set_((w - 0.5).clone())


def by_shared_memory(module, w):
    module.share_memory()
    process = multiprocessing.get_context("fork").Process(target=in_place, args=(module, w))
    process.start()
    process.join(60)
    assert process.exitcode == 0


WAYS = [
    by_optimizer, in_place, by_data, by_replaced_data, by_numpy, by_address, by_state_dict, by_replacement,
    by_storage, by_shared_memory,
]  # fmt: skip


@pytest.mark.parametrize("change", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_a_changed_weight_takes_effect_at_the_next_call(kind, change, training):
    theirs, ours = make_pair(kind)
    x = make_input(kind, B=8)
    state = torch.randn(8, 4, dtype=torch.float64) if kind.endswith("Cell") else None
    state = (state, state) if kind == "LSTMCell" else state
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(ours(x, state), theirs(x, state))  # what a call may keep, it has kept
        before = first(ours(x, state)).clone()
        name = "weight_hh" if kind.endswith("Cell") else "weight_hh_l0"
        expected = {k: v.detach() - 0.5 if k == name else v.detach() for k, v in ours.named_parameters()}
        change(ours, getattr(ours, name))
        after = first(ours(x, state))
        torch.testing.assert_close(after, first(functional_call(theirs, expected, (x, state))))
        assert not torch.equal(after, before)


# ---- Threads and processes ---------------------------------------------------------------------------


def test_eight_threads_may_call_one_module_at_once():
    _, ours = make_pair("LSTM", 8, 48, num_layers=2, bidirectional=True)
    inputs = [torch.randn(12, b, 8, dtype=torch.float64) for b in (1, 2, 3, 5, 8, 9, 16, 17)]
    expected = [ours(x)[0].detach() for x in inputs]
    wrong = []

    def work(x, y):
        for _ in range(10):
            got, _ = ours(x)
            torch.autograd.grad(got.sum(), list(ours.parameters()))
            if not torch.allclose(got, y):
                wrong.append(x.shape)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def _run_in_child(module, x, queue):
    torch.set_num_threads(1)  # torch's own pool does not survive a fork either
    y, _ = module(x)
    y.sum().backward()
    queue.put(y.detach().numpy())


def test_works_in_a_forked_process_after_use_in_the_parent():
    _, ours = make_pair("GRU", 3, 40)
    x = make_input(T=10, B=6)
    expected, _ = ours(x)
    expected.sum().backward()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_run_in_child, args=(ours, x, queue))
    process.start()
    process.join(60)
    if process.is_alive():
        process.terminate()
        pytest.fail("the forked process did not finish")
    assert process.exitcode == 0
    torch.testing.assert_close(torch.from_numpy(queue.get()), expected.detach())


# ---- Conversion --------------------------------------------------------------------------------------


def test_convert_changes_classes_and_nothing_else():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"a": nn.LSTM(3, 4), "b": nn.Sequential(nn.GRU(4, 5), nn.Dropout()), "c": nn.RNNCell(5, 6)}
    )
    model.eval()
    calls = []
    model["a"].register_forward_hook(lambda *a: calls.append(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters = list(model.parameters())
    x = make_input(dtype=torch.float32)
    expected = model["a"](x)
    assert fastrnn.convert(model) is model
    assert type(model["a"]) is fastrnn.LSTM
    assert type(model["b"][0]) is fastrnn.GRU
    assert type(model["c"]) is fastrnn.RNNCell
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model["a"](x), expected)
    assert len(calls) == 2
    assert not model["a"].training
    model["a"](x)[0].sum().backward()
    optimizer.step()
    assert fastrnn.to_torch(model) is model
    assert type(model["a"]) is nn.LSTM
    assert type(model["c"]) is nn.RNNCell
    model["a"](x)


def test_convert_takes_a_module_alone_and_leaves_strangers_as_they_are():
    class Mine(nn.LSTM):
        def forward(self, x):
            return "mine"

    assert type(fastrnn.convert(nn.GRU(1, 1))) is fastrnn.GRU
    assert type(fastrnn.convert(nn.Linear(1, 1))) is nn.Linear
    mine = fastrnn.convert(nn.Sequential(Mine(1, 1)))[0]
    assert type(mine) is Mine
    assert mine(None) == "mine"
    parametrized = parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    x = make_input(dtype=torch.float32)
    expected = parametrized(x)[0]
    torch.testing.assert_close(fastrnn.convert(parametrized)(x)[0], expected)


def test_convert_finds_a_module_that_is_used_twice():
    shared = nn.GRU(3, 3)
    model = fastrnn.convert(nn.ModuleList([shared, shared]))
    assert model[0] is model[1]
    assert type(model[0]) is fastrnn.GRU


# ---- Autocast and types without a kernel ---------------------------------------------------------------


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("device", "lowered"), [("cpu", torch.bfloat16), ("cpu", torch.float16), ("meta", torch.bfloat16)]
)
@pytest.mark.parametrize("form", [*KINDS, "packed LSTM", "packed GRU", "projected LSTM", "empty LSTM"])
def test_autocast_gives_torch_nns_dtypes_and_close_values(form, lowered, device):
    """For weights, inputs and states of any dtypes. torch.nn's LSTM raises in oneDNN on processors without
    16-bit products; ours gives there what it gives on the others."""
    kind, options = form.split()[-1], {"proj_size": 5} if form == "projected LSTM" else {}
    one_step, B = kind.endswith("Cell"), 0 if form == "empty LSTM" else 2
    grads = [True, False] if device == "cpu" else [True]  # meta is slow
    for weight, input_type, state, grad in itertools.product(DTYPES[:2], DTYPES, [None, *DTYPES], grads):
        modules = make_pair(kind, 16, 16, dtype=weight, **options)
        torch.manual_seed(1)
        x = make_input(kind, 2, B, 16, torch.float32).to(device, input_type)
        widths = [options.get("proj_size", 16), 16][: 2 if kind.startswith("LSTM") else 1]
        hx = [torch.randn(*(() if one_step else (1,)), B, width).to(device, state) for width in widths]
        hx = tuple(hx) if kind.startswith("LSTM") else hx[0]
        if form.startswith("packed"):
            x = pack_padded_sequence(x, [2, 1])
        results = []
        for module in modules:
            try:
                with torch.autocast("cpu", lowered), torch.set_grad_enabled(grad):
                    leaves = tree_leaves(module.to(device)(x, None if state is None else hx))
                results.append([t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()])
            except RuntimeError as error:
                results.append(error)
        expected, got = results
        float64 = {dtype is torch.float64 for dtype in (weight, input_type, state or input_type)}
        if len(float64) == 2 and device == "cpu":  # autocast leaves float64 as it is
            assert isinstance(expected, RuntimeError), (weight, input_type, state)
            assert isinstance(got, RuntimeError), (weight, input_type, state)
            assert "not the same dtype" in str(got)
            continue
        if isinstance(expected, RuntimeError):
            assert [t.dtype for t in got] == 3 * [lowered]
        else:
            assert [t.dtype for t in got] == [t.dtype for t in expected], (weight, input_type, state)
        if device == "cpu" and not isinstance(expected, RuntimeError):
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
        if grad:
            got[0].double().sum().backward()
            assert all(p.grad is not None and p.grad.dtype == weight for p in modules[1].parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_can_be_compiled(kind):
    _, ours = make_pair(kind, dtype=torch.float32)
    x = make_input(kind, dtype=torch.float32)
    with torch.autocast("cpu"):
        got = torch.compile(ours, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(got, ours(x))


@pytest.fixture
def forgotten_warnings():
    fastrnn.functional._warned.clear()
    yield
    fastrnn.functional._warned.clear()
    fastrnn.set_strict(False)


@pytest.mark.usefixtures("forgotten_warnings", "without_16_bit_kernels")
@pytest.mark.parametrize("kind", KINDS)
def test_a_dtype_without_a_kernel_takes_torch_nns_path_and_warns_once(kind):
    theirs, ours = make_pair(kind, dtype=torch.bfloat16)
    x = make_input(kind, dtype=torch.bfloat16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert_same(ours, theirs, x)
    reasons = [str(w.message) for w in caught if issubclass(w.category, fastrnn.FallbackWarning)]
    assert len(reasons) == 1
    assert "bfloat16" in reasons[0]


@pytest.mark.usefixtures("forgotten_warnings", "without_16_bit_kernels")
@pytest.mark.parametrize("kind", KINDS)
def test_strict_mode_raises_instead(kind):
    assert fastrnn.set_strict(True) is False
    _, ours = make_pair(kind, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"bfloat16.*strict"):
        ours(make_input(kind, dtype=torch.bfloat16))
    _, ours = make_pair(kind)
    ours(make_input(kind))


# ---- Input forms -------------------------------------------------------------------------------------


def test_packed_and_padded_agree():
    _, ours = make_pair("LSTM", bidirectional=True, batch_first=True)
    x = torch.randn(4, 6, 3, dtype=torch.float64)
    lengths = torch.tensor([3, 6, 1, 4])
    packed, (h_n, c_n) = ours(pack_padded_sequence(x, lengths, True, enforce_sorted=False))
    y, got = pad_packed_sequence(packed, batch_first=True)
    assert torch.equal(got, lengths)
    for b, n in enumerate(lengths):
        alone, (h, c) = ours(x[b : b + 1, :n])
        torch.testing.assert_close(y[b, :n], alone[0])
        torch.testing.assert_close(h_n[:, b], h[:, 0])
        torch.testing.assert_close(c_n[:, b], c[:, 0])
        assert (y[b, n:] == 0).all()


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_zero_layers_of_dropout_change_nothing_and_states_chain(kind):
    """A sequence in two halves, the state handed on, is the sequence."""
    _, ours = make_pair(kind, num_layers=2)
    x = make_input(T=8)
    whole, _ = ours(x)
    front, state = ours(x[:3])
    back, _ = ours(x[3:], state)
    torch.testing.assert_close(torch.cat((front, back)), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_share_memory_with_inputs_or_each_other(kind):
    _, ours = make_pair(kind)
    x = make_input(kind)
    with torch.no_grad():
        outputs = tree_leaves(ours(x))
        before = [t.clone() for t in outputs[1:]]
        kept = x.clone()
        outputs[0].fill_(7)
    assert torch.equal(x, kept)
    for a, b in zip(outputs[1:], before, strict=True):
        assert torch.equal(a, b)
