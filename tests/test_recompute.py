"""``memory=``: a layer that scans its segments once more has the gradients of the loop, and keeps little."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from step_loop import (
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
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn._recompute import default_k

pytestmark = pytest.mark.filterwarnings("ignore:fastrnn.*no kernel yet")

STACKS = [
    ("LSTM", {}),
    ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 2}),
    ("LSTM", {"peephole": True, "reverse": True, "bias": False}),
    ("GRU", {"num_layers": 2, "bidirectional": True}),
    ("RNN", {"bidirectional": True}),
    *((kind, {**options_of(kind), "num_layers": 2}) for kind in LAYERS),
    ("LSTM", {**{n: SINGLE[n] for n in options_of("LSTM") if n != "reverse"}, "bidirectional": True}),
]


@pytest.fixture(params=STACKS, ids=str)
def module(request):
    kind, options = request.param
    return make(kind, memory=2, **options)  # segments of 2, 2 and 1 steps


def test_it_follows_the_loop_over_dense_sequences(module):
    x, hx, reset = randn(T, B, I).requires_grad_(), initial(module), torch.rand(T, B) < 0.4
    y, last, every = seeded(loop, module, x, hx)
    wanted = [x, *hx, *module.parameters()]
    assert_same_with_gradients(flat(seeded(module, x, as_hx(hx))), [y, *last], wanted)
    found = flat(seeded(module, x, as_hx(hx), return_states=True))
    assert_same_with_gradients(found, [y, *every], wanted)
    y, last, _ = seeded(loop, module, x, hx, torch.tensor([2, 5, 0]), reset)
    module.batch_first = True
    found = seeded(module, x.transpose(0, 1), as_hx(hx), torch.tensor([2, 5, 0]), reset.T)
    assert_same_with_gradients(flat(found), [y.transpose(0, 1), *last], wanted)
    torch.testing.assert_close(seeded(module, x[:, 1])[0], seeded(module, x[:, 1:2].transpose(0, 1))[0][0])


def test_it_follows_the_loop_from_the_states_of_a_reset(module):
    x, hx, reset = randn(T, B, I).requires_grad_(), initial(module), torch.rand(T, B) < 0.4
    to, lengths = [randn(T, *h.shape).requires_grad_() for h in hx], torch.tensor([2, 5, 4])
    y, last, _ = seeded(loop, module, x, hx, lengths, reset, to)
    found = flat(seeded(module, x, as_hx(hx), lengths, reset, reset_to=as_hx(to)))
    assert_same_with_gradients(found, [y, *last], [x, *hx, *to, *module.parameters()])


def test_it_follows_the_loop_over_packed_sequences(module):
    x, hx, lengths = randn(T, B, I).requires_grad_(), initial(module), torch.tensor([2, 5, 1])
    packed, hidden = seeded(module, pack_padded_sequence(x, lengths, enforce_sorted=False), as_hx(hx))
    found = flat((pad_packed_sequence(packed)[0], hidden))
    y, last, _ = seeded(loop, module, x, hx, lengths, packed=True)
    assert_same_with_gradients(found, [y, *last], [x, *hx, *module.parameters()])


@pytest.mark.parametrize("options", [{"layer_norm": True}, {"coupled": True}], ids=str)
@pytest.mark.parametrize("memory", [1, 3, 4, "recompute"])
def test_each_length_of_a_segment_gives_what_store_gives(memory, options):
    stores = make("LSTM", num_layers=2, bidirectional=True, **options)
    module = make("LSTM", num_layers=2, bidirectional=True, memory=memory, **options)
    module.load_state_dict(stores.state_dict())
    x, hx = randn(40, B, I).requires_grad_(), initial(module)
    wanted, found = [x, *hx], []
    for each in (module, stores):
        y, (h_n, _) = each(x, hx)
        found.append((y, torch.autograd.grad(y.sum() + h_n.sum(), [*wanted, *each.parameters()])))
        # h_n of one layer alone, dL/dy missing
        found[-1] += tuple(torch.autograd.grad(each(x, hx)[1][0][1].sum(), wanted, materialize_grads=True))
    torch.testing.assert_close(*found)
    assert (default_k(40), default_k(200), default_k(10**6), default_k(1)) == (20, 50, 4000, 1)


@pytest.mark.parametrize("kind", ["IndRNN", "SLSTM", "LayerNormGRU"])
def test_modules_that_torch_nn_has_not_take_it_too(kind):
    module = make(kind, num_layers=2, bidirectional=True, memory=2)
    stores = make(kind, num_layers=2, bidirectional=True)
    stores.load_state_dict(module.state_dict())
    x, lengths, reset = randn(T, B, I).requires_grad_(), torch.tensor([2, 5, 0]), torch.rand(T, B) < 0.4
    found, expected = (flat(each(x, None, lengths, reset, True)) for each in (module, stores))
    of_nodes = [found[0].sum() + found[-1].square().sum(), expected[0].sum() + expected[-1].square().sum()]
    gradients = [
        torch.autograd.grad(loss, [x, *each.parameters()])
        for loss, each in zip(of_nodes, (module, stores), strict=True)
    ]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*gradients)
    assert "Recomputed" in str(found[0].grad_fn.next_functions[0][0].next_functions)


def test_states_that_are_one_tensor_and_inputs_without_gradients():
    module, x, h = make("LSTM", memory=2), randn(T, B, I), randn(1, B, H).requires_grad_()
    y, last, _ = loop(module, x, [h, h])
    assert_same_with_gradients(flat(module(x, (h, h))), [y, *last], [h, *module.parameters()])
    module.weight_hh_l0.requires_grad_(False)
    assert_same_with_gradients(flat(module(x, (h, h))), [y, *last], [module.weight_ih_l0])
    with torch.no_grad():
        torch.testing.assert_close(module(x, (h, h))[0], y)


def test_derivatives_of_first_and_second_order_and_forward_mode():
    module = fastrnn.LSTM(2, 2, dtype=torch.float64, memory=1, bidirectional=True)
    names = [name for name, _ in module.named_parameters()]

    def function(x, h, c, *parameters):
        return tuple(flat(functional_call(module, dict(zip(names, parameters, strict=True)), (x, (h, c)))))

    arguments = [randn(2, 2, 2).requires_grad_() for _ in range(3)] + list(module.parameters())
    assert torch.autograd.gradcheck(function, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, arguments)


def test_transforms_copies_and_graphs_compute_the_same():
    module, x = make("GRU", memory=2), randn(2, T, B, I)
    expected = torch.stack([module(one)[0] for one in x])
    torch.testing.assert_close(vmap(lambda x: module(x)[0])(x), expected)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters, x):
        return functional_call(module, parameters, (x,))[0].square().sum()

    of_func = grad(loss)(parameters, x[0])
    of_backward = torch.autograd.grad(loss(dict(module.named_parameters()), x[0]), list(module.parameters()))
    torch.testing.assert_close(tuple(of_func.values()), of_backward)
    gs = randn(2, T, B, H)
    y, weights = module(x[0])[0], list(module.parameters())
    found = torch.autograd.grad(y, weights, gs, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, weights, g, retain_graph=True) for g in gs]
    torch.testing.assert_close(found, tuple(torch.stack(parts) for parts in zip(*each, strict=True)))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        y = compiled(x[0])[0]
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), weights), of_backward)
    torch.testing.assert_close(torch.export.export(module, (x[0],)).module()(x[0]), module(x[0]))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert "memory=2" in repr(twin)
        torch.testing.assert_close(twin(x[0]), module(x[0]))


def test_hooks_of_the_state_gradients_see_every_step():
    x, found = randn(T, B, I), []
    for memory in ("store", 2):
        module, seen = make("LSTM", num_layers=2, bidirectional=True, memory=memory), []
        for parameter in module.parameters():
            nn.init.constant_(parameter, 0.3)
        module.register_state_gradient_hook(seen.append)
        module(x, lengths=torch.tensor([2, 5, 0]))[0].square().sum().backward()
        found.append([(s.layer, s.dh, s.dc) for s in seen])
    torch.testing.assert_close(*found)
    assert len(found[0]) == 2


@pytest.mark.parametrize("layer_norm", [False, True])
def test_autocast_changes_no_gradient(layer_norm):
    x, gradients = torch.randn(T, B, I), []
    for memory in ("store", 2):
        module = make("LSTM", torch.float32, layer_norm=layer_norm, memory=memory)
        for parameter in module.parameters():
            nn.init.constant_(parameter, 0.3)
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)[0]
        gradients.append(torch.autograd.grad(y.float().square().sum(), list(module.parameters())))
    torch.testing.assert_close(*gradients, rtol=0.02, atol=1e-5)


PEAK = """
import re, sys, torch, fastrnn

def peak():  # MiB; getrusage's begins with that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

T, memory = 30_000, sys.argv[1]
lstm = fastrnn.LSTM(1, 64, memory=memory)
x = torch.randn(T, 4, 1)
y = x.new_zeros(T, 4, 64)  # what every call has: y
before = peak()
del y
lstm(x)[0].sum().backward()
print(peak() - before, x.numel() * 64 * 4 / 2**20)
"""


def test_training_keeps_little():
    """Peak memory in MiB beyond y: dL/dy and with ``store`` c and four gates, each as large as y."""

    def peak(memory):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, memory], capture_output=True, text=True, check=True
        )
        more, y = map(float, done.stdout.split())
        return more / y

    assert peak("store") > 5
    assert peak("recompute") < 2


@pytest.mark.parametrize("kind", LAYERS)
def test_other_values_are_refused_and_torch_nn_has_no_such_option(kind):
    for value in ("all", 0, -3, 2.0, True, None):
        with pytest.raises(ValueError, match=r"memory should be 'store', 'recompute' or a number of steps"):
            getattr(fastrnn, kind)(I, H, memory=value)
    with pytest.warns(UserWarning, match="memory=recompute"):
        assert fastrnn.to_torch(made := make(kind, memory="recompute")) is made
    assert "memory" not in repr(make(kind, memory="store"))
    assert fastrnn.convert(made) is made
