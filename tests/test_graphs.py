"""What users do with the graph between forward and backward: outputs changed in place, saved tensors held or
moved by hooks, batches of gradients, padding that holds NaN, backward inside a region of autocast."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from scans import make_scan
from test_autograd import MODULES, flat, make_pair
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import _operators, functional
from fastrnn.reference import CELLS

MASK = (torch.arange(12).view(4, 3, 1) % 5 != 0).double()
DONE = torch.tensor([True, False, True])
CELLS_OF_MODULES = [("LSTMCell", {}), ("GRUCell", {}), ("RNNCell", {})]

# ---- Outputs changed in place, beside the same without it ----------------------------------------------


def scaled(y, in_place):
    return y.mul_(MASK) if in_place else y * MASK


def zeroed(y, in_place):
    y = y if in_place else y.clone()
    y[1, DONE] = 0
    return y


def rectified(y, in_place):
    return torch.relu_(y) if in_place else torch.relu(y)


def dropped(y, in_place):
    torch.manual_seed(3)
    return nn.functional.dropout(y, 0.5, True, inplace=in_place)


def filled(y, in_place):
    return y.zero_() + 1 if in_place else y * 0 + 1


CHANGES = [scaled, zeroed, rectified, dropped, filled]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_an_output_changed_in_place_gives_the_gradients_of_a_changed_copy(kind, options, change):
    _, module = make_pair(kind, options, num_layers=2)
    x = torch.randn(4, 3, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for in_place in (False, True):
        y, *states = flat(module(x))
        loss = change(y, in_place).square().sum() + sum(s.sin().sum() for s in states)
        first = torch.autograd.grad(loss, [x, *module.parameters()], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *module.parameters()])
        found.append((*first, *second))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_every_state_may_be_changed_in_place(kind, options, change):
    _, module = make_pair(kind, options)
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    found = []
    for in_place in (False, True):
        y, states = module(x, return_states=True)
        states = states if isinstance(states, tuple) else (states,)
        loss = y.sum() + sum(change(s.squeeze(1), in_place).square().sum() for s in states)
        found.append(torch.autograd.grad(loss, list(module.parameters())))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize(
    "change", [lambda s, t: s.mul_(MASK[t]), lambda s, t: s.masked_fill_(DONE[:, None], 0)]
)
@pytest.mark.parametrize(("kind", "options"), CELLS_OF_MODULES)
def test_states_of_cells_may_be_masked_in_place_in_a_loop(kind, options, change):
    """As recurrent policies do where an episode ends."""
    _, cell = make_pair(kind, options)
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    found = []
    for in_place in (False, True):
        state, total = None, 0
        for t in range(4):
            state = cell(x[t], state)
            states = state if isinstance(state, tuple) else (state,)
            states = tuple(change(s if in_place else s.clone(), t) for s in states)
            state = states if isinstance(state, tuple) else states[0]
            total = total + states[0].sum()
        found.append(torch.autograd.grad(total, list(cell.parameters())))
    torch.testing.assert_close(found[1], found[0])


def test_packed_outputs_may_be_changed_in_place():
    theirs, ours = make_pair("LSTM", {})
    packed = pack_padded_sequence(torch.randn(4, 3, 3, dtype=torch.float64), [4, 2, 1])
    found = []
    for module in (theirs, ours):
        y, _ = module(packed)
        y.data.mul_(0.5)
        found.append(torch.autograd.grad(y.data.square().sum(), list(module.parameters())))
    torch.testing.assert_close(found[1], found[0])


def test_an_input_or_weight_changed_in_place_is_an_error_as_in_torch():
    for change in (lambda m, x: x.mul_(2), lambda m, x: m.weight_hh_l0.mul_(2)):
        for module in make_pair("GRU", {}):
            x = torch.randn(4, 2, 3, dtype=torch.float64)
            y, _ = module(x)
            with torch.no_grad():
                change(module, x)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


def test_a_graph_that_nobody_holds_is_freed_at_once():
    def hook(gradients):
        pass

    module = fastrnn.LSTM(3, 4)
    gc.collect()
    gc.disable()
    try:
        y, _ = functional.lstm(
            torch.randn(4, 2, 3), (torch.zeros(1, 2, 4),) * 2, list(module.parameters()), True, 1, 0.0, True,
            False, False, state_hook=hook,
        )[:2]  # fmt: skip
        held = weakref.ref(hook)
        del hook, y, _
        assert held() is None
    finally:
        gc.enable()


# ---- Saved tensors in other hands -----------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_tensors_that_hooks_hold_are_not_written_over(kind, options):
    theirs, ours = make_pair(kind, options, num_layers=2, bidirectional=True)
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    held = []

    def keep(t):
        held.append((t, t.detach().clone()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = ours(x)[0]
    y.square().sum().backward()
    assert held
    assert all(torch.equal(t, copied) for t, copied in held)
    theirs(x)[0].square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_saved_tensors_may_come_back_from_read_only_files(kind, options, tmp_path):
    theirs, ours = make_pair(kind, options, bidirectional=True)
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    count = iter(range(1000))

    def store(t):
        if t.numel() == 0:
            return t
        file = tmp_path / f"{next(count)}.npy"
        np.save(file, t.detach().numpy())
        return file

    def load(file):
        return file if isinstance(file, torch.Tensor) else torch.from_numpy(np.load(file, mmap_mode="r"))

    with torch.autograd.graph.saved_tensors_hooks(store, load):
        y = ours(x)[0]
        loss = y.square().sum()
        y.detach().zero_()  # what the hooks took is a copy by now
    found = torch.autograd.grad(loss, list(ours.parameters()))
    torch.testing.assert_close(
        found, torch.autograd.grad(theirs(x)[0].square().sum(), list(theirs.parameters()))
    )


# ---- Batches of gradients ----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_a_batch_of_gradients_is_each_gradient_by_itself(kind, options):
    _, ours = make_pair(kind, options, bidirectional=True)
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    y, wanted = ours(x)[0], [x, *ours.parameters()]
    gradients = torch.randn(5, *y.shape, dtype=torch.float64)
    each = [torch.autograd.grad(y, wanted, g, retain_graph=True) for g in gradients]
    expected = [torch.stack(parts) for parts in zip(*each, strict=True)]
    for keep in (True, False):
        found = torch.autograd.grad(y, wanted, gradients, retain_graph=keep, is_grads_batched=True)
        torch.testing.assert_close(list(found), expected)


@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_vectorised_jacobians_and_hessians_equal_the_others(kind, options):
    _, ours = make_pair(kind, options)
    x = torch.randn(3, 1, 3, dtype=torch.float64)
    expected = jacobian(lambda x: ours(x)[0], x)
    for strategy in ("reverse-mode", "forward-mode"):
        found = jacobian(lambda x: ours(x)[0], x, vectorize=True, strategy=strategy)
        torch.testing.assert_close(found, expected)

    def scalar(x):
        return ours(x)[0].sin().sum()

    expected = hessian(scalar, x)
    for strategy in ("reverse-mode", "forward-mode"):
        found = hessian(scalar, x, vectorize=True, outer_jacobian_strategy=strategy)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("kind", "options"), [case for case in MODULES if case[1] != {"nonlinearity": "relu"}]
)
def test_gradcheck_accepts_batches_of_gradients(kind, options):
    _, ours = make_pair(kind, options, I=2, H=3)
    x = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: flat(ours(x)),
        x,
        check_batched_grad=True,
        check_forward_ad=True,
        check_batched_forward_grad=True,
    )
    assert torch.autograd.gradgradcheck(lambda x: flat(ours(x)), x, check_batched_grad=True)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_vmap_takes_lengths_and_resets_of_each_sample(kind, options, batch_first):
    _, ours = make_pair(kind, options, num_layers=2, bidirectional=True, batch_first=batch_first)
    x = torch.randn(4, 5, 5, 3, dtype=torch.float64)
    lengths = torch.randint(0, 6, (4, 5))
    reset = torch.rand(4, 5, 5) < 0.3
    found = vmap(lambda x, n, r: flat(ours(x, lengths=n, reset=r)))(x, lengths, reset)
    each = [flat(ours(*one, lengths=n, reset=r)) for *one, n, r in zip(x, lengths, reset, strict=True)]
    for i, output in enumerate(found):
        torch.testing.assert_close(output, torch.stack([e[i] for e in each]))

    def loss(parameters, x, n, r):
        y = flat(functional_call(ours, parameters, (x,), {"lengths": n, "reset": r}))
        return sum(o.sin().sum() for o in y)

    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    found = vmap(grad(loss), in_dims=(None, 0, 0, 0))(parameters, x, lengths, reset)
    for i in range(4):
        expected = grad(loss)(parameters, x[i], lengths[i], reset[i])
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name][i], gradient)


@pytest.mark.parametrize("batch_first", [False, True])
def test_vmap_over_empty_batches_gives_empty_results(batch_first):
    ours = fastrnn.GRU(3, 4, batch_first=batch_first)
    shape = (2, 0, 5, 3) if batch_first else (2, 5, 0, 3)
    y, h = vmap(ours)(torch.randn(shape))
    assert y.shape == (*shape[:3], 4)
    assert h.shape == (2, 1, 0, 4)


# ---- Steps beyond a row's length do not happen ------------------------------------------------------


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_what_stands_in_the_padding_reaches_no_derivative(kind, options, batch_first, poison):
    _, ours = make_pair(kind, options, num_layers=2, bidirectional=True, batch_first=batch_first)
    lengths = torch.tensor([5, 0, 3])
    clean = torch.randn(3, 5, 3, dtype=torch.float64)
    padding = torch.arange(5) >= lengths[:, None]
    found = []
    for fill in (0.0, poison):
        x, dy, tangent = (
            torch.where(padding[..., None], torch.full_like(t, fill), t)
            for t in (clean, torch.ones(3, 5, 8 if "proj_size" not in options else 4).double(), clean.cos())
        )
        x, dy, tangent = (t if batch_first else t.transpose(0, 1) for t in (x, dy, tangent))
        x = x.detach().requires_grad_()
        wanted = [x, *ours.parameters()]
        y = ours(x, lengths=lengths)[0]
        first = torch.autograd.grad(y, wanted, dy, retain_graph=True)
        graphed = torch.autograd.grad(y, wanted, dy, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in graphed), wanted)
        _, pushed = torch.func.jvp(lambda x: ours(x, lengths=lengths)[0], (x.detach(),), (tangent,))
        found.append((y.detach(), *first, *graphed, *second, pushed))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
        assert b.isfinite().all()


@pytest.mark.parametrize("form", [{}, {"batch_first": True}, {"reset": True}])
@pytest.mark.parametrize("name", CELLS)
def test_the_products_of_cuda_take_nothing_from_the_padding(name, form):
    scan = make_scan(name, 4, 5, 3, D=2, lengths=True, **form)
    outputs = scan.kernel()
    dgates = scan.kernel_backward(outputs, scan.gradients(outputs))[0]
    poisoned = scan.x.masked_fill(scan.layout.without_padding(torch.ones(20, 1)) == 0, torch.nan)
    for products in (_operators.weight_gradients_of_torch, _operators.composed_weight_gradients):
        arguments = (
            name,
            dgates,
            scan.x,
            outputs[0],
            scan.states,
            *_operators.given(scan.slots),
            *scan.rows,
            not CELLS[name].takes_gates,
            True,
        )
        dx, dweights = products(*arguments)
        found_dx, found_dweights = products(*arguments[:2], poisoned, *arguments[3:])
        for a, b in zip((*found_dx, *found_dweights), (*dx, *dweights), strict=True):
            assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:fastrnn")
@pytest.mark.usefixtures("without_16_bit_kernels")
def test_padding_is_harmless_where_a_module_is_composed_of_torch_operations():
    module = fastrnn.LSTM(3, 4).to(torch.bfloat16)
    x = torch.randn(5, 2, 3).to(torch.bfloat16)
    x[3:, 1] = torch.nan
    module(x, lengths=torch.tensor([5, 3]))[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


# ---- Autocast --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_backward_inside_autocast_rounds_nothing(kind, options):
    _, module = make_pair(kind, options)
    module = copy.deepcopy(module).float()
    x = torch.randn(6, 4, 3, requires_grad=True)
    found = []
    for enabled in (False, True):
        y = module(x)[0]
        with torch.autocast("cpu", enabled=enabled):
            first = torch.autograd.grad(y.sin().sum(), [x, *module.parameters()], create_graph=True)
            second = torch.autograd.grad(sum(g.sin().sum() for g in first), [x, *module.parameters()])
        found.append((*first, *second))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
