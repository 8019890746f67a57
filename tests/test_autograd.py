"""The operators and modules under every transformation of torch: derivatives of any order and mode, vmap,
compilation and export."""

import copy
import itertools
import re

import pytest
import torch
from scans import CELL_NAMES, FORMS, KINDS, make_scan
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import _autograd, _operators
from fastrnn.reference import CELLS

CASES = [(name, None, "time_major") for name in CELL_NAMES]
CASES += [(name, None, form) for name in KINDS for form in ("batch_first", "packed")]
CASES += [("lstm", 2, form) for form in FORMS] + [
    ("gru", None, "lengths"),
    ("rnn_tanh", None, "packed_reset"),
]


def differentiable(name, T, B, H, D=1, **options):
    """(function of its tensors, the tensors) for _autograd.scan."""
    scan = make_scan(name, T, B, H, D=D, **options)
    S = len(scan.states)

    def function(x, *rest):
        y, last, _ = _autograd.scan(name, x, rest[:S], rest[S:], scan.layout)
        return (y, *last)

    tensors = [scan.x, *scan.states, *scan.slots]
    return function, tuple(None if t is None else t.requires_grad_() for t in tensors)


@pytest.mark.parametrize(("name", "P", "form"), CASES)
def test_first_derivatives_are_those_of_finite_differences(name, P, form):
    function, tensors = differentiable(name, 3, 2, 3, D=2, P=P, **FORMS[form])
    assert gradcheck(function, tensors, fast_mode=True)
    function, tensors = differentiable(name, 2, 2, 3, P=P, bias=False, **FORMS[form])
    assert gradcheck(function, tensors)


@pytest.mark.parametrize(("name", "P", "form"), CASES)
def test_second_derivatives_are_those_of_finite_differences(name, P, form):
    function, tensors = differentiable(name, 3, 2, 3, D=2, P=P, **FORMS[form])
    assert gradgradcheck(function, tensors, fast_mode=True)
    function, tensors = differentiable(name, 2, 1, 2, P=1 if P else None, **FORMS[form])
    assert gradgradcheck(function, tensors)


@pytest.mark.parametrize(("name", "P", "form"), CASES)
def test_forward_mode_derivatives_are_those_of_finite_differences(name, P, form):
    function, tensors = differentiable(name, 3, 2, 3, D=2, P=P, **FORMS[form])
    assert gradcheck(function, tensors, check_forward_ad=True, check_backward_ad=False, fast_mode=True)


@pytest.mark.parametrize("name", CELL_NAMES)
def test_third_derivatives_exist_and_are_right(name):
    function, tensors = differentiable(name, 2, 1, 2)
    some = [t for t in tensors if t is not None]
    y = function(*tensors)[0]
    (first,) = torch.autograd.grad((y**3).sum(), some[:1], create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), some[:1], create_graph=True)
    direction = torch.randn_like(second)
    (third,) = torch.autograd.grad((second * direction).sum(), some[:1])

    def second_at(h0):
        y = function(h0, *tensors[1:])[0]
        (first,) = torch.autograd.grad((y**3).sum(), h0, create_graph=True)
        return torch.autograd.grad((first**2).sum(), h0)[0]

    if name == "rnn_relu":
        return  # piecewise linear: finite differences may cross a corner
    epsilon, step = 1e-5, torch.randn_like(some[0])
    ahead = second_at((some[0] + epsilon * step).detach().requires_grad_())
    behind = second_at((some[0] - epsilon * step).detach().requires_grad_())
    numeric = ((ahead - behind) / (2 * epsilon) * direction).sum()
    torch.testing.assert_close((third * step).sum(), numeric, rtol=1e-4, atol=1e-6)


# ---- opcheck -----------------------------------------------------------------------------------------

OPCHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


@pytest.mark.parametrize(("name", "P", "form"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck_accepts_the_operators_of_a_scan(name, P, form, dtype):
    for D, B, save in ((1, 3, 1), (2, 1, 0), (1, 2, 2)):
        scan = make_scan(name, 4, B, 5, D=D, P=P, dtype=dtype, **FORMS[form])
        torch.library.opcheck(torch.ops.fastrnn.scan.default, scan.arguments(save), test_utils=OPCHECKS)
        outputs = scan.kernel()
        for wanted in ("all", "first", "y"):
            arguments = scan.backward_arguments(outputs, scan.gradients(outputs, wanted), wanted == "all")
            for overload in ("default", "over") if CELLS[name].reuses_saved else ("default",):
                operator = getattr(torch.ops.fastrnn.scan_backward, overload)
                torch.library.opcheck(operator, arguments, test_utils=OPCHECKS)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("form", ["reset", "packed"])
def test_opcheck_accepts_the_operators_with_options(name, form):
    scan = make_scan(name, 4, 3, 5, D=2, **FORMS[form])
    cell, (masks, to) = CELLS[name], scan.options(stepwise=True)
    numbers = (1.0, float(cell.states > 1), 0.0, 0.0)
    arguments = (*scan.arguments(), *_operators.with_options(numbers, masks, to))
    torch.library.opcheck(torch.ops.fastrnn.scan.options, arguments, test_utils=OPCHECKS)
    _, _, _, saved = torch.ops.fastrnn.scan.options(*arguments)
    outputs, fresh = scan.kernel(), [None, None]
    zoned = _operators.zoned_after(cell, numbers)
    assert len(saved) == (cell.saved > 0) + len(zoned)
    for k, t in zip(zoned, saved[cell.saved > 0 :], strict=True):
        fresh[k] = t
    more = _operators.with_options(numbers, masks, to, fresh)
    arguments = (*scan.backward_arguments(outputs, scan.gradients(outputs)), *more)
    torch.library.opcheck(torch.ops.fastrnn.scan_backward.options, arguments, test_utils=OPCHECKS)


# ---- Modules -----------------------------------------------------------------------------------------

MODULES = [
    ("LSTM", {}),
    ("LSTM", {"proj_size": 2}),
    ("GRU", {}),
    ("RNN", {}),
    ("RNN", {"nonlinearity": "relu"}),
]


def make_pair(kind, options, I=3, H=4, **more):
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(I, H, dtype=torch.float64, **options, **more)
    ours = getattr(fastrnn, kind)(I, H, dtype=torch.float64, **options, **more)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def flat(result):
    y, states = result
    return (y, *states) if isinstance(states, tuple) else (y, states)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_compiles_without_a_graph_break(kind, options):
    _, ours = make_pair(kind, options, num_layers=2, bidirectional=True)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for B in (2, 3):  # the second size makes a dynamic graph
        x = torch.randn(5, B, 3, dtype=torch.float64, requires_grad=True)
        expected, got = flat(ours(x)), flat(compiled(x))
        torch.testing.assert_close(got, expected)
        wanted = [x, *ours.parameters()]
        torch.testing.assert_close(
            torch.autograd.grad(sum(o.sin().sum() for o in got), wanted),
            torch.autograd.grad(sum(o.sin().sum() for o in expected), wanted),
        )


def test_with_dynamos_default_settings_compiled_models_still_give_the_same():
    torch._dynamo.reset()
    _, ours = make_pair("GRU", {})
    model = nn.Sequential(nn.Linear(3, 3, dtype=torch.float64), ours)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    expected, got = flat(model(x)), flat(torch.compile(model, backend="aot_eager")(x))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got[0].sum(), [x, *ours.parameters()]),
        torch.autograd.grad(expected[0].sum(), [x, *ours.parameters()]),
    )


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiles_with_the_default_backend():
    _, ours = make_pair("LSTM", {})
    model = nn.Sequential(nn.Linear(3, 3, dtype=torch.float64), ours)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(model, fullgraph=True)
    expected, got = flat(model(x)), flat(compiled(x))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got[0].sum(), [x, *ours.parameters()]),
        torch.autograd.grad(expected[0].sum(), [x, *ours.parameters()]),
    )


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells_compile_inside_a_python_loop(kind):
    _, cell = make_pair(kind, {})

    def loop(x):
        state = None
        for x_t in x:
            state = cell(x_t, state)
        return state[0] if isinstance(state, tuple) else state

    x = torch.randn(3, 2, 3, dtype=torch.float64)
    compiled = torch.compile(loop, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), loop(x))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_exports_and_the_exported_program_gives_the_same(kind, options):
    _, ours = make_pair(kind, options, batch_first=True)
    ours.eval()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    program = torch.export.export(ours, (x,), dynamic_shapes=({0: torch.export.Dim("B", min=2)},))
    assert any("fastrnn" in str(node.target) for node in program.graph.nodes)
    other = torch.randn(7, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(flat(program.module()(other)), flat(ours(other)))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_vmap_over_inputs_is_a_loop_over_inputs(kind, options, batch_first):
    _, ours = make_pair(kind, options, num_layers=2, bidirectional=True, batch_first=batch_first)
    x = torch.randn(4, 5, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        got = vmap(lambda x: flat(ours(x)))(x)
        expected = [flat(ours(one)) for one in x]
    for i, output in enumerate(got):
        torch.testing.assert_close(output, torch.stack([e[i] for e in expected]))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_per_sample_gradients_are_those_of_single_samples(kind, options, batch_first):
    theirs, ours = make_pair(kind, options, batch_first=batch_first)
    parameters = {k: v.detach() for k, v in ours.named_parameters()}
    x = torch.randn(4, 5, 3, dtype=torch.float64)

    def loss(parameters, x):
        y = flat(functional_call(ours, parameters, (x.unsqueeze(0 if batch_first else 1),)))
        return sum(o.sin().sum() for o in y)

    got = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, one in enumerate(x):
        theirs.zero_grad()
        sum(o.sin().sum() for o in flat(theirs(one.unsqueeze(0 if batch_first else 1)))).backward()
        for name, parameter in theirs.named_parameters():
            torch.testing.assert_close(got[name][i], parameter.grad)


@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_ensembles_train_under_vmap_of_grad_with_mapped_weights(kind, options):
    models = [make_pair(kind, options)[1] for _ in range(3)]
    for i, model in enumerate(models):
        for parameter in model.parameters():
            parameter.data += 0.1 * i
    parameters, buffers = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    x = torch.randn(5, 2, 3, dtype=torch.float64)

    def loss(parameters, x):
        return sum(o.sin().sum() for o in flat(functional_call(skeleton, (parameters, buffers), (x,))))

    got = vmap(grad(loss), in_dims=(0, None))(parameters, x)
    for i, model in enumerate(models):
        sum(o.sin().sum() for o in flat(model(x))).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(got[name][i], parameter.grad)


def scalar_and_input(kind, options):
    _, ours = make_pair(kind, options)
    return lambda x: ours(x)[0].sin().sum(), torch.randn(2, 1, 3, dtype=torch.float64)


@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_forward_and_reverse_mode_agree(kind, options):
    _, ours = make_pair(kind, options)
    x = torch.randn(2, 1, 3, dtype=torch.float64)

    def f(x):
        return ours(x)[0].sum((1, 2))

    torch.testing.assert_close(jacfwd(f)(x), jacrev(f)(x))
    tangent = torch.randn_like(x)
    _, forward = jvp(f, (x,), (tangent,))
    _, pull = vjp(f, x)
    cotangent = torch.randn_like(forward)
    torch.testing.assert_close((forward * cotangent).sum(), (pull(cotangent)[0] * tangent).sum())


@pytest.mark.parametrize("order", ["forward over reverse", "reverse over forward", "forward over forward"])
@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_hessians_agree_in_every_order_of_modes(kind, options, order):
    f, x = scalar_and_input(kind, options)
    outer, inner = {
        "forward over reverse": (jacfwd, jacrev),
        "reverse over forward": (jacrev, jacfwd),
        "forward over forward": (jacfwd, jacfwd),
    }[order]
    torch.testing.assert_close(outer(inner(f))(x), jacrev(jacrev(f))(x))


# ---- Graphs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_a_retained_graph_gives_the_same_gradients_twice(kind, options):
    _, ours = make_pair(kind, options, num_layers=2)
    loss = ours(torch.randn(5, 2, 3, dtype=torch.float64))[0].sin().sum()
    first = torch.autograd.grad(loss, list(ours.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(ours.parameters()))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, list(ours.parameters()))


@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_a_gradient_penalty_has_torch_nns_gradients(kind, options):
    results = []
    for module in make_pair(kind, options, bidirectional=True):
        torch.manual_seed(1)
        x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
        y, _ = module(x)
        (dx,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        penalty = (dx.norm() - 1) ** 2 + y.sum()
        results.append(torch.autograd.grad(penalty, [x, *module.parameters()]))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_second_derivatives_through_packed_sequences(kind, options):
    results = []
    for module in make_pair(kind, options, bidirectional=True):
        torch.manual_seed(1)
        x = torch.randn(5, 3, 3, dtype=torch.float64, requires_grad=True)
        packed = pack_padded_sequence(x, torch.tensor([2, 5, 3]), enforce_sorted=False)
        y, states = module(packed)
        states = states if isinstance(states, tuple) else (states,)
        loss = y.data.sin().sum() + sum(s.cos().sum() for s in states)
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        results.append(torch.autograd.grad((dx**2).sum(), [x, *module.parameters()], allow_unused=True))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_each_parameter_alone_may_want_a_gradient(kind, options):
    theirs, ours = make_pair(kind, options, num_layers=2, bidirectional=True)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    for name, _ in ours.named_parameters():
        for module in (theirs, ours):
            for other, parameter in module.named_parameters():
                parameter.requires_grad_(other == name)
                parameter.grad = None
            flat(module(x))[0].sin().sum().backward()
        for (other, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert (a.grad is None) == (other != name)
            torch.testing.assert_close(a.grad, b.grad)


def test_frozen_weights_get_no_gradient_and_pass_one_to_the_input():
    theirs, ours = make_pair("GRU", {})
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    gradients = []
    for module in (theirs, ours):
        module.requires_grad_(False)
        gradients.append(torch.autograd.grad(module(x)[0].sum(), x)[0])
        assert all(p.grad is None for p in module.parameters())
    torch.testing.assert_close(*gradients)
    assert not ours(x.detach())[0].requires_grad


@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_backward_works_in_eval_mode(kind, options):
    theirs, ours = make_pair(kind, options, num_layers=2, dropout=0.9)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    for module in (theirs, ours):
        module.eval()
        module(x)[0].sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_no_graph_is_made_where_none_is_wanted(kind, options, mode):
    theirs, ours = make_pair(kind, options, bidirectional=True)
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    with mode():
        got = flat(ours(x))
        torch.testing.assert_close(got, flat(theirs(x)))
    assert not any(o.requires_grad for o in got)
    assert all(o.is_inference() == (mode is torch.inference_mode) for o in got)


def test_outputs_that_nobody_uses_cost_no_wrong_gradient():
    theirs, ours = make_pair("LSTM", {}, bidirectional=True)
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    for used in itertools.product([0, 1], repeat=3):
        if not any(used):
            continue
        expected, got = (
            torch.autograd.grad(
                sum(o.sin().sum() for o, u in zip(flat(m(x)), used, strict=True) if u),
                [x, *m.parameters()],
            )
            for m in (theirs, ours)
        )
        torch.testing.assert_close(got, expected)


def test_hooks_and_anomaly_mode_see_ordinary_gradients():
    _, ours = make_pair("GRU", {})
    seen = []
    ours.weight_hh_l0.register_hook(lambda g: seen.append(g.shape))
    with torch.autograd.set_detect_anomaly(True):
        ours(torch.randn(4, 2, 3, dtype=torch.float64))[0].sum().backward()
    assert seen == [ours.weight_hh_l0.shape]


def test_activation_checkpointing_gives_the_same_gradients():
    _, ours = make_pair("LSTM", {})
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(ours(x)[0].sin().sum(), [x, *ours.parameters()])
    y, _ = torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), [x, *ours.parameters()]), plain)


# ---- Gate gradients over the saved activations -------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_only_the_last_back_propagation_writes_over_what_was_saved(kind, options):
    """A kept graph gives the same gradients each time, and so does the last use of it."""
    _, ours = make_pair(kind, options)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    wanted = [x, *ours.parameters()]
    y = ours(x)[0]
    loss, node = (y**2).sum(), y.grad_fn
    while not re.match("(EagerScan|Direct)", node.name()):
        node = node.next_functions[0][0]
    saves = kind != "RNN"
    kept = {"LSTM": 1, "GRU": 0, "RNN": 0}[kind]  # after every c
    saved = node.saved_tensors[kept + node.name().startswith("EagerScan")]  # after y, too
    before = saved.clone()
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    assert torch.equal(saved, before)
    second = torch.autograd.grad(loss, wanted)
    assert torch.equal(saved, before) != saves
    assert saved._version == int(saves)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
