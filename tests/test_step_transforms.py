"""The options that act on the states between steps: derivatives, transforms, and which kernel runs."""

import copy

import pytest
import step_loop
import torch
from step_loop import EVERYTHING, LAYERS, B, H, I, T, flat, loop, make, make_input, options_of, randn, seeded
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import fastrnn
from fastrnn import functional

pytestmark = pytest.mark.filterwarnings("error:fastrnn", "ignore:.*deprecated")


def first(result):
    return result[0] if isinstance(result, tuple) else result


# ---- Derivatives ---------------------------------------------------------------------------------------


def of_parameters(module):
    """The outputs as a function of x and the parameters, with the same masks in each call."""
    names = [name for name, _ in module.named_parameters()]

    def function(x, *parameters):
        torch.manual_seed(7)
        result = functional_call(module, dict(zip(names, parameters, strict=True)), (x,))
        return tuple(flat(result)) if isinstance(result, tuple) and isinstance(result[1], tuple) else result

    return function


@pytest.mark.parametrize(("kind", "options"), EVERYTHING, ids=str)
def test_derivatives_of_first_and_second_order_and_forward_mode(kind, options):
    options = {**options, "state_gradient_clip": 100.0}  # clipped, a gradient is no derivative
    module = getattr(fastrnn, kind)(2, 2, dtype=torch.float64, **options)
    x = randn(*(2, 2) if kind.endswith("Cell") else (2, 2, 2)).requires_grad_()
    arguments = (x, *module.parameters())
    assert torch.autograd.gradcheck(of_parameters(module), arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(of_parameters(module), arguments)


@pytest.mark.parametrize(("kind", "zoneout"), [("LSTM", 0.0), ("LSTM", 0.3), ("GRU", 0.0)])
def test_back_propagation_through_a_clipped_gradient_is_that_of_the_loop(kind, zoneout):
    module = make(kind, state_gradient_clip=0.05, zoneout=zoneout)
    x, found, w = randn(T, B, I).requires_grad_(), [], randn(T, B, H)
    for run in (module, lambda x: loop(module, x)):
        y = seeded(run, x)[0]
        gradients = torch.autograd.grad((y * w).sum(), [x, *module.parameters()], create_graph=True)
        penalty = sum(g.square().sum() for g in gradients)
        found.append((*gradients, *torch.autograd.grad(penalty, [x, *module.parameters()])))
    torch.testing.assert_close(*found)


def test_forward_mode_through_a_clipped_gradient_is_exact():
    module = make("GRU", state_gradient_clip=0.05)

    def gradient(x):
        return grad(lambda x: module(x)[0].square().sum())(x)

    x, step = make_input("GRU"), 1e-6 * make_input("GRU")
    _, found = jvp(gradient, (x,), (step,))
    torch.testing.assert_close(found, (gradient(x + step) - gradient(x - step)) / 2, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_reset_to_has_derivatives_of_every_order(kind):
    module = getattr(fastrnn, kind)(2, 2, dtype=torch.float64)
    x, reset = randn(3, 2, 2).requires_grad_(), torch.tensor([[0, 1], [1, 0], [0, 0]], dtype=torch.bool)
    to = [randn(1, 2, 2).requires_grad_() for _ in range(2 if kind == "LSTM" else 1)]

    def function(x, *to):
        return module(x, reset=reset, reset_to=to if len(to) > 1 else to[0])[0]

    assert torch.autograd.gradcheck(function, (x, *to), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (x, *to))
    found = vmap(function, in_dims=(0,) + (None,) * len(to))(torch.stack([x, 2 * x]), *to)
    torch.testing.assert_close(found, torch.stack([function(x, *to), function(2 * x, *to)]))


@pytest.mark.parametrize(("kind", "options"), EVERYTHING, ids=str)
def test_transforms_of_torch_func(kind, options):
    module, xs = make(kind, **options).eval(), make_input(kind, 3)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    torch.testing.assert_close(
        vmap(lambda x: first(module(x)))(xs), torch.stack([first(module(x)) for x in xs])
    )

    def loss(parameters, x):
        return first(functional_call(module, parameters, (x,))).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, xs)
    for i, x in enumerate(xs):
        expected = torch.autograd.grad(first(module(x)).square().sum(), list(module.parameters()))
        for g, e in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(g[i], e)
    if "state_gradient_clip" not in options:
        return
    module._fused_options = {**module._fused_options, "state_gradient_clip": 100.0}
    name = next(name for name in parameters if name.startswith("bias_ih"))

    def of_bias(b):
        return loss({**parameters, name: b}, xs[0])

    b = parameters[name]
    torch.testing.assert_close(hessian(of_bias)(b), jacrev(jacrev(of_bias))(b))
    torch.testing.assert_close(jacfwd(of_bias)(b), jacrev(of_bias)(b))


def test_vmap_over_lengths_and_batches_of_gradients():
    module, x = make("LSTM", **options_of("LSTM")).eval(), make_input("LSTM")
    lengths = torch.tensor([[1, 5, 0], [4, 4, 2]])
    found = vmap(lambda n: module(x, lengths=n)[0])(lengths)
    torch.testing.assert_close(found, torch.stack([module(x, lengths=n)[0] for n in lengths]))
    y, weights = module(x)[0], list(module.parameters())
    gs = randn(2, *y.shape)
    found = torch.autograd.grad(y, weights, gs, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, weights, g, retain_graph=True) for g in gs]
    torch.testing.assert_close(found, tuple(torch.stack(parts) for parts in zip(*each, strict=True)))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell"])
def test_compiled_whole_with_gradients(kind):
    torch._dynamo.reset()
    module, x = make(kind, **options_of(kind)), make_input(kind)[:2]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    keywords = {} if kind.endswith("Cell") else {"lengths": torch.tensor([1, 2, 0])}
    found = []
    for function in (module, compiled):
        y = first(seeded(function, x, **keywords))
        found.append((y, torch.autograd.grad(y.square().sum(), list(module.parameters()))))
    torch.testing.assert_close(*found)
    module.eval()
    torch.testing.assert_close(compiled(x, **keywords), module(x, **keywords))


@pytest.mark.usefixtures("without_16_bit_kernels")
def test_a_compiled_call_without_a_kernel_warns_too_without_a_break_of_its_graph(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(functional, "_warned", set())
    module, x = make("GRUCell", torch.bfloat16, zoneout=0.3).eval(), make_input("GRUCell").bfloat16()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with pytest.warns(functional.FallbackWarning, match=r"no CPU kernels for torch\.bfloat16; a path of"):
        found = compiled(x)
    torch.testing.assert_close(compiled(x), found)
    torch.testing.assert_close(module(x), found)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("kind", "options"), EVERYTHING, ids=str)
def test_traced_and_exported_modules_compute_the_same(kind, options):
    module, x = make(kind, **options), make_input(kind)
    traced = torch.jit.trace(module, (x,), check_trace=False)
    torch.testing.assert_close(seeded(traced, x), seeded(module, x))
    module.eval()
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*dynamo")
def test_onnx_export_refuses_in_one_line(tmp_path):
    module, x = make("GRU", zoneout=0.5).eval(), make_input("GRU")
    with pytest.raises(RuntimeError, match=r"fastrnn: torch\.onnx\.export does not take zoneout"):
        torch.onnx.export(module, (x,), str(tmp_path / "m"), dynamo=False)


# ---- Which kernel runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), EVERYTHING, ids=str)
def test_all_of_them_run_on_the_kernels_and_strict_mode_lets_them(kind, options):
    module, x = make(kind, **options), make_input(kind)
    before = fastrnn.set_strict(True)
    try:
        for _ in range(2):
            module(x)
            (found,) = fastrnn.explain(module, x)
            assert found.operator == f"fastrnn::{module._cell_name()}"
            assert all(f"{name}={value}" in found.options for name, value in options.items())
            module.eval()
    finally:
        fastrnn.set_strict(before)


def test_without_gradients_clipping_them_changes_nothing():
    module, twin, x = make("GRU", state_gradient_clip=0.1), make("GRU"), make_input("GRU")
    twin.load_state_dict(module.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(module(x), twin(x), atol=0, rtol=0)
    torch.testing.assert_close(module(x), twin(x), atol=0, rtol=0)


def test_a_hook_of_state_gradients_gets_rows_as_they_lie_or_says_why_not():
    module, x, lengths, seen = make("GRU", reverse=True), make_input("GRU"), torch.tensor([2, 5, 4]), []
    module.register_state_gradient_hook(seen.append)
    y, _ = module(x, lengths=lengths)
    y.square().sum().backward()
    twin = make("GRU", bidirectional=True)
    twin.load_state_dict(
        twin.state_dict() | {f"{name}_reverse": w for name, w in module.state_dict().items()}
    )
    others = []
    twin.register_state_gradient_hook(others.append)
    twin(x, lengths=lengths)[0][..., H:].square().sum().backward()
    torch.testing.assert_close(seen[0].dh[0], others[0].dh[1])
    assert seen[0].rows.lengths is not None


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("off", ["reverse", "zoneout", "state_gradient_clip"])
def test_a_hook_of_state_gradients_sees_the_complete_ones_after_their_clip(monkeypatch, kind, off):
    options = {name: value for name, value in options_of(kind).items() if name not in ("reverse", off)}
    module, x, seen, states = make(kind, **options), make_input(kind).requires_grad_(), [], []
    module.register_state_gradient_hook(seen.append)
    seeded(module, x)[0].square().sum().backward()
    clipped = step_loop.clipped_gradient

    def recorded(v, state):
        states.append(clipped(v, state))
        states[-1].retain_grad()
        return states[-1]

    monkeypatch.setattr(step_loop, "clipped_gradient", recorded)
    seeded(loop, module, x)[0].square().sum().backward()
    gradients = [torch.zeros_like(s) if s.grad is None else s.grad for s in states]  # c of an LSTM before h
    expected = torch.stack(gradients).view(B, T, -1, H)
    found = [seen[0].dh] if seen[0].dc is None else [seen[0].dc, seen[0].dh]
    torch.testing.assert_close(torch.stack([t.view(T, B, H) for t in found], 2).transpose(0, 1), expected)


@pytest.mark.parametrize(("kind", "options"), EVERYTHING, ids=str)
def test_other_dtypes_and_autocast(monkeypatch, kind, options):
    monkeypatch.setattr(functional, "warn", lambda *_: None)
    module, x = make(kind, **options), make_input(kind)
    expected = seeded(module, x)
    low = copy.deepcopy(module).bfloat16()
    found = seeded(low, x.bfloat16())
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.1, check_dtype=False)
    assert first(found).dtype == torch.bfloat16
    single = copy.deepcopy(module).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = seeded(single, x.float())
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02, check_dtype=False)
