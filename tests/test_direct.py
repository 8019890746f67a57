"""Plain calls past torch's dispatcher (csrc/direct) give the bits of the operators, which take all others."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import _C, _direct

LAYERS = {"LSTM": 2, "GRU": 1, "RNN": 1}  # states
T, B, I, H = 5, 3, 4, 7


class Operators(TorchDispatchMode):
    """Lets every operator pass; a call that it sees is not plain."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def is_direct(module, *args) -> bool:
    output = module(*args)
    y = output[0] if isinstance(output, tuple) else output
    return type(y.grad_fn).__name__ == "DirectBackward"


def flat(output) -> list:
    return [t for part in output for t in (part if isinstance(part, tuple) else (part,))]


def module_and_arguments(
    name, layers=1, bidirectional=False, batch_first=False, bias=True, dtype=torch.float32, hx=True
):
    module = getattr(fastrnn, name)(
        I, H, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional, dtype=dtype
    )
    shape = (B, T, I) if batch_first else (T, B, I)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    size = (layers * (2 if bidirectional else 1), B, H)
    states = tuple(torch.randn(size, dtype=dtype, requires_grad=True) for _ in range(LAYERS[name] * hx))
    return module, x, states


def cell_and_arguments(name, bias=True, hx=True):
    module = getattr(fastrnn, f"{name}Cell")(I, H, bias=bias)
    x = torch.randn(B, I, requires_grad=True)
    return module, x, tuple(torch.randn(B, H, requires_grad=True) for _ in range(LAYERS[name] * hx))


def call(module, x, states):
    if not states:
        return flat(module(x)) if isinstance(module, nn.RNNBase) else flat((module(x),))
    hx = states if len(states) > 1 else states[0]
    output = module(x, hx)
    return flat(output if isinstance(output, tuple) else (output,))


def gradients(outputs, module, x, states, **keywords):
    inputs = [x, *states, *module.parameters()]
    return torch.autograd.grad(sum((t * t).sum() for t in outputs), inputs, **keywords)


# layers, bidirectional, batch_first, bias, dtype, hx
FORMS = list(
    itertools.product(
        (1, 2), (False, True), (False, True), (True, False), (torch.float32, torch.float64), (True, False)
    )
)


def assert_the_bits_of_the_operators(module, x, states, of=None) -> list:
    """Of outputs and gradients; returns them."""
    assert is_direct(module, x)
    found = call(module, x, states)
    found += gradients(found, module, x, states)
    with Operators():
        expected = call(module, x, states)
        expected += gradients(expected, module, x, states)
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want), of
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_a_stack_gives_the_bits_of_the_operators(name):
    for form in FORMS:
        module, x, states = module_and_arguments(name, *form)
        found = assert_the_bits_of_the_operators(module, x, states, of=form)
        with torch.no_grad():
            assert all(map(torch.equal, call(module, x, states), found))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("hx", [True, False])
def test_a_cell_gives_the_bits_of_the_operators(name, bias, hx):
    assert_the_bits_of_the_operators(*cell_and_arguments(name, bias, hx))


@pytest.mark.parametrize("name", LAYERS)
def test_every_subset_of_gradients(name):
    module, x, states = module_and_arguments(name, layers=2)
    tensors = [x, *states, *module.parameters()]
    whole = gradients(call(module, x, states), module, x, states)
    for k in range(len(tensors)):
        for of in ({k}, set(range(len(tensors))) - {k}):
            for i, t in enumerate(tensors):
                t.requires_grad_(i in of)
            inputs = [tensors[i] for i in sorted(of)]
            found = torch.autograd.grad(sum((t * t).sum() for t in call(module, x, states)), inputs)
            for i, got in zip(sorted(of), found, strict=True):
                torch.testing.assert_close(got, whole[i], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck_and_gradgradcheck(name):
    module, x, states = module_and_arguments(name, layers=2, dtype=torch.float64)
    weights = tuple(module.parameters())

    def outputs(x, *rest):
        given = dict(zip((n for n, _ in module.named_parameters()), rest[len(states) :], strict=True))
        hx = rest[: len(states)] if len(states) > 1 else rest[0]
        y, h = torch.func.functional_call(module, given, (x, hx))
        return (y, *h) if isinstance(h, tuple) else (y, h)

    assert type(outputs(x, *states, *weights)[0].grad_fn).__name__ == "DirectBackward"
    inputs = (x, *states, *weights)
    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(outputs, inputs, fast_mode=True)


def test_a_weight_that_is_made_from_the_input_keeps_both_ways_apart():
    cell, x = fastrnn.GRUCell(I, H).double(), torch.randn(B, I, dtype=torch.float64, requires_grad=True)
    reference = nn.GRUCell(I, H).double()
    reference.load_state_dict(cell.state_dict())

    def second(module):
        weights = {"weight_ih": module.weight_ih.detach() * x.sum()}
        h = torch.func.functional_call(module, weights, (x,))
        (first,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
        return first, *torch.autograd.grad(first.square().sum(), x)

    for got, want in zip(second(cell), second(reference), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_changed_in_place_before_backward(name):
    module, x, states = module_and_arguments(name, layers=2)
    y, *rest = call(module, x, states)
    expected = gradients([y * 2, *rest], module, x, states)
    y, *rest = call(module, x, states)
    y *= 2
    for got, want in zip(gradients([y, *rest], module, x, states), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_a_kept_graph_gives_the_same_gradients_twice():
    module, x, states = module_and_arguments("LSTM", layers=2)
    outputs = call(module, x, states)
    first = gradients(outputs, module, x, states, retain_graph=True)
    assert all(map(torch.equal, first, gradients(outputs, module, x, states)))


def test_batched_gradients_one_by_one():
    module, x, states = module_and_arguments("LSTM", dtype=torch.float64)
    y = module(x, states)[0]
    seeds = torch.randn(3, *y.shape, dtype=torch.float64)
    (batched,) = torch.autograd.grad(y, x, seeds, is_grads_batched=True, retain_graph=True)
    for seed, got in zip(seeds, batched, strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(y, x, seed, retain_graph=True)[0])


def test_gradients_under_vmap_of_a_graph_from_outside():
    module, x, states = module_and_arguments("GRU", dtype=torch.float64)
    y = module(x, states[0])[0]
    seeds = torch.randn(3, *y.shape, dtype=torch.float64)
    mapped = torch.func.vmap(lambda seed: torch.autograd.grad(y, x, seed, retain_graph=True)[0])(seeds)
    for seed, got in zip(seeds, mapped, strict=True):
        torch.testing.assert_close(got, torch.autograd.grad(y, x, seed, retain_graph=True)[0])


def test_results_of_inference_mode_are_inference_tensors():
    module, x, _ = module_and_arguments("LSTM")
    with torch.inference_mode():
        assert all(t.is_inference() for t in flat(module(x.detach())))


class Seen(torch.Tensor):
    """A subclass that wants to see the operators."""


NOT_PLAIN = {
    "negated view": lambda x: torch._neg_view(x),
    "subclass": lambda x: x.as_subclass(Seen),
    "half": lambda x: x.half(),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "empty batch": lambda x: x[:, :0],
    "wrong size": lambda x: x[..., :-1],
    "zero tensor": lambda x: torch._efficientzerotensor(x.shape),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "conjugated part": lambda x: torch.complex(x, x).conj().imag,
}


@pytest.mark.parametrize("what", NOT_PLAIN)
def test_what_is_not_plain_is_not_read(what):
    module, x, _ = module_and_arguments("LSTM")
    bad = NOT_PLAIN[what](x.detach())
    assert _direct.run("lstm", bad, (), module._flat_weights) is None


@pytest.mark.parametrize("what", ["negated view", "conjugated part", "transposed"])
def test_what_is_not_plain_gives_torch_nns_results(what):
    module, x, _ = module_and_arguments("LSTM")
    reference = nn.LSTM(I, H)
    reference.load_state_dict(module.state_dict())
    bad = NOT_PLAIN[what](x.detach())
    torch.testing.assert_close(module(bad)[0], reference(bad)[0])


def test_weights_are_looked_at_too():
    module, x, _ = module_and_arguments("LSTM")
    for k, weight in enumerate(module._flat_weights):
        weights = [w.detach() for w in module._flat_weights]
        for bad in (weight[:-1], weight.detach().double(), torch._neg_view(weight.detach()), None):
            weights[k] = bad
            assert _direct.run("lstm", x.detach(), (), weights) is None
    assert _direct.run("gru", x.detach(), (), module._flat_weights) is None
    assert _direct.run("no such cell", x.detach(), (), module._flat_weights) is None


def test_what_backward_is_given_is_checked():
    module, x, _ = module_and_arguments("LSTM", layers=2)
    weights, x = module._flat_weights, x.detach()
    keep, y, _, _, *kept = _C.forward("lstm", x, (), weights, 2, 1, False, True, None)
    assert keep
    wanted, dy = (True,) * (1 + len(weights)), torch.ones_like(y)

    def back(y=y, kept=kept, gradients=(dy, None, None), wanted=wanted):
        return _C.backward("lstm", x, (), weights, 2, 1, False, y, kept, gradients, False, wanted)

    assert back() is not None
    assert back(y=y[:2]) is None
    assert back(kept=kept[1:]) is None
    assert back(kept=[kept[0][:2], *kept[1:]]) is None
    assert back(gradients=(dy[:1], None, None)) is None
    assert back(gradients=(dy, None)) is None
    assert back(wanted=wanted[1:]) is None


@pytest.mark.parametrize("name", LAYERS)
def test_modes_and_transforms_see_the_operators(name):
    module, x, _ = module_and_arguments(name)
    with Operators():
        assert not is_direct(module, x)
    with torch.autograd.profiler.profile() as profile:
        module(x)
    assert any("fastrnn::scan" in event.name for event in profile.function_events)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert not is_direct(module, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_direct(module, x)
    seen = []
    handle = module.register_state_gradient_hook(seen.append) if isinstance(module, nn.RNNBase) else None
    assert not is_direct(module, x)
    if handle:
        handle.remove()
    assert is_direct(module, x)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.int8])
def test_a_layer_with_a_pack_uses_it(weights):
    lstm = fastrnn.prepack(fastrnn.LSTM(I, H, 2).eval(), weights)
    x = torch.randn(T, B, I)
    with torch.no_grad():
        found = flat(lstm(x))
        assert _direct.run("lstm", x, (), lstm._flat_weights, 2) is not None
        with Operators():
            assert all(map(torch.equal, found, flat(lstm(x))))
    plain = fastrnn.LSTM(I, H, 2)
    plain.load_state_dict(lstm.state_dict())
    assert not torch.equal(plain(x)[0], found[0])  # rounded weights


@pytest.mark.parametrize("storage", ["", "int8"])
def test_a_damaged_pack_is_not_read(storage):
    lstm = fastrnn.LSTM(I, H).eval()
    packed = torch.ops.fastrnn.pack("lstm", lstm._flat_weights, 15, storage)
    with torch.no_grad():

        def run(pack):
            return _C.forward(
                "lstm", torch.randn(T, B, I), (), lstm._flat_weights, 1, 1, False, False, [pack]
            )

        assert run(packed) is not None
        assert run(packed[:-1]) is None
        for k in range(128):
            damaged = packed.clone()
            damaged[k] += 1
            assert run(damaged) is None, k
        assert run(packed.view(torch.int8)) is None
        assert (
            _C.forward("lstm", torch.randn(T, B, I + 1), (), lstm._flat_weights, 1, 1, False, False, [packed])
            is None
        )
        other = torch.ops.fastrnn.pack("lstm", fastrnn.LSTM(I + 1, H)._flat_weights, 15)
        assert run(other) is None
