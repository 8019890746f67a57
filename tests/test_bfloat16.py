"""16-bit modules and autocast on the CPU: fused scans with states and sums in float32, and products of
bfloat16 where the processor has instructions for them."""

import copy

import pytest
import torch
from scans import FORMS, make_scan
from test_isa_threads import finish, start
from torch import nn
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn import functional, step_options
from fastrnn.reference import CELLS

HAS = torch.ops.fastrnn.cpu_bfloat16()
needs_products = pytest.mark.skipif(not HAS, reason="no products of bfloat16: FASTRNN_CPU_BFLOAT16=portable")
DENSE = [name for name, cell in CELLS.items() if cell.dense]
PRODUCTS = ("amx", "avx512_bf16", "portable")


@pytest.fixture
def rounded_h(monkeypatch):
    """The reference rounds h before its product, as the kernels do."""
    monkeypatch.setattr(step_options.StepOptions, "masked", lambda self, h: h.bfloat16().to(h.dtype))


def make(name, *sizes, **form):
    """Arguments in float32 and float64 whose matrices, and x beside them, hold numbers that bfloat16 has."""
    scan = make_scan(name, *sizes, dtype=torch.float32, **form)
    for part in ("w_ih", "w_hh", "w_hr"):
        setattr(scan, part, [w.bfloat16() for w in getattr(scan, part)])
    if not CELLS[name].takes_gates:
        scan.x = scan.x.bfloat16()
    return scan, scan.to("cpu", torch.float64)


def poison():
    """Leaves NaN in the working memory that the next call borrows."""
    lstm = fastrnn.LSTM(200, 200)
    with torch.no_grad():
        lstm(torch.full((3, 70, 200), torch.nan))


SIZES = [
    (1, 1, 1),
    (1, 3, 32),
    (1, 33, 64),
    (1, 5, 3),
    (3, 2, 7),
    (4, 17, 16),
    (2, 33, 31),
    (9, 48, 32),
    (60, 1, 20),
    (6, 70, 65),
]


@needs_products
@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize(("T", "B", "H"), SIZES)
def test_every_step_is_the_reference_from_the_state_before_it(name, T, B, H, rounded_h):
    for D in (1, 2):
        scan, _ = make(name, T, B, H, D=D, I=32 if H % 32 == 0 else 33)
        poison()
        y, *_, history = scan.kernel(save=2)
        for d, h, one in scan.each_step(y, history):
            expected = one.to("cpu", torch.float64).reference()[0].view(B, D, H)[:, d]
            torch.testing.assert_close(h.double(), expected, rtol=2e-5, atol=2e-5)


@needs_products
@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_the_way_back(name, form, rounded_h):
    projections = (None, 5) if CELLS[name].hidden else (None,)
    for P in projections:
        scan, exact = make(name, 7, 6, 18, D=2, P=P, I=9, **FORMS[form])
        poison()
        found, expected = scan.kernel(), exact.reference()
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(
                a.double(), b, rtol=0, atol=0.02 * max(1, b.abs().max().item()) if b.numel() else 0
            )
        gradients = scan.gradients(found)
        back = exact.reference_backward(
            tuple(t.double() for t in found), tuple(g if g is None else g.double() for g in gradients)
        )
        for a, b in zip(scan.kernel_backward(found, gradients), back, strict=True):
            if b.numel():
                torch.testing.assert_close(a.double(), b, rtol=0, atol=0.03 * b.abs().max().item())


def modules(kind, dtype, **options):
    """torch.nn's module and fastrnn's in 16 bits, and the same numbers in float64."""
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(24, 40, **options).to(dtype)
    ours = fastrnn.convert(copy.deepcopy(theirs))
    return theirs, ours, copy.deepcopy(theirs).double()


def results(module, x, dtype, **keywords):
    """Outputs and gradients."""
    x = x.to(dtype).requires_grad_()
    outputs = [t for t in tree_leaves(module(x, **keywords)) if isinstance(t, torch.Tensor)]
    weights = [torch.linspace(-1, 1, t.numel(), dtype=torch.float64).view_as(t) for t in outputs]
    loss = sum((t.double() * w).sum() for t, w in zip(outputs, weights, strict=True))
    return outputs, list(torch.autograd.grad(loss, [x, *module.parameters()]))


def error(found, exact):
    return [
        ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()
        for a, b in zip(found, exact, strict=True)
    ]


MODULES = [
    ("LSTM", {}), ("LSTM", {"num_layers": 2, "bidirectional": True}), ("LSTM", {"proj_size": 16}),
    ("GRU", {}), ("GRU", {"bias": False, "batch_first": True}), ("RNN", {"nonlinearity": "relu"}),
    ("LSTMCell", {}), ("GRUCell", {}), ("RNNCell", {"bias": False}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", functional.SUMMED_IN_FLOAT32)
@pytest.mark.parametrize(("kind", "options"), MODULES)
@pytest.mark.parametrize("B", [1, 9])
def test_a_module_is_as_exact_as_torch_nns(kind, options, dtype, B):
    theirs, ours, exact = modules(kind, dtype, **options)
    x = torch.randn(*(() if kind.endswith("Cell") else (12,)), B, 24).to(dtype)
    given, expected, right = (
        results(m, x, d) for m, d in ((ours, dtype), (theirs, dtype), (exact, torch.float64))
    )
    for a, b, c in zip(given, expected, right, strict=True):
        assert [t.dtype for t in a] == [t.dtype for t in b]
        for ours_is_off, theirs_is_off in zip(error(a, c), error(b, c), strict=True):
            assert ours_is_off <= 1.5 * theirs_is_off + torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", functional.SUMMED_IN_FLOAT32)
def test_lengths_and_resets_in_16_bits_are_those_of_float64(dtype):
    _, ours, exact = modules("GRU", dtype, bidirectional=True)
    fused = fastrnn.convert(exact)
    x, reset = torch.randn(12, 9, 24).to(dtype), torch.rand(12, 9) < 0.2
    keywords = {"lengths": [12, 3, 0, 7, 1, 12, 5, 9, 2], "reset": reset}
    for a, b in zip(
        results(ours, x, dtype, **keywords), results(fused, x, torch.float64, **keywords), strict=True
    ):
        assert max(error(a, b)) < 8 * torch.finfo(dtype).eps


def test_nothing_falls_back_in_strict_mode():
    before = fastrnn.set_strict(True)
    try:
        for dtype in functional.SUMMED_IN_FLOAT32:
            fastrnn.LSTM(3, 4, dtype=dtype)(torch.zeros(5, 2, 3, dtype=dtype))
    finally:
        fastrnn.set_strict(before)


@pytest.mark.parametrize("options", [
    {"zoneout": 0.2}, {"recurrent_dropout": 0.3}, {"variational_dropout": 0.3}, {"cell_clip": 0.5},
    {"peephole": True}, {"layer_norm": True}, {"memory": "recompute"}, {"coupled": True},
])  # fmt: skip
def test_options_in_16_bits(options):
    """The same masks, and results that differ by the rounding alone."""
    found = []
    lstm = fastrnn.LSTM(24, 40, **options, dtype=torch.bfloat16)
    x = torch.randn(12, 9, 24).bfloat16()
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(1)
        outputs, gradients = results(copy.deepcopy(lstm).to(dtype), x, dtype)
        found.append((outputs, gradients))
    if "dropout" in str(options) or "zoneout" in options:
        return  # the generator draws other numbers in another dtype; that it trains is what is tested
    for a, b in zip(*found, strict=True):
        assert max(error(a, [t.double() for t in b])) < 0.03


def test_a_reset_to_given_states_in_16_bits():
    lstm = fastrnn.LSTM(4, 6, dtype=torch.bfloat16)
    x, reset = torch.randn(5, 2, 4).bfloat16(), torch.zeros(5, 2, dtype=torch.bool)
    reset[2] = True
    h, c = (torch.randn(1, 2, 6).bfloat16().requires_grad_() for _ in range(2))
    y, _ = lstm(x, reset=reset, reset_to=(h, c))
    torch.testing.assert_close(y[2:], lstm(x[2:], (h, c))[0])
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(y[2:].sum(), (h, c)))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_autocast_gives_float32_parameters_gradients_and_torch_nns_dtypes(kind):
    theirs, ours, exact = modules(kind, torch.float32)
    x = torch.randn(12, 9, 24)
    found = []
    for module in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            try:
                found.append(results(module, x, torch.float32))
            except RuntimeError:  # torch.nn's LSTM on AVX2
                pytest.skip("torch.nn has no autocast of it on this processor")
    right = results(exact, x, torch.float64)
    for a, b, c in zip(*found, right, strict=True):
        assert [t.dtype for t in a] == [t.dtype for t in b]
        for ours_is_off, theirs_is_off in zip(error(a, c), error(b, c), strict=True):
            assert ours_is_off <= 1.5 * theirs_is_off + 2**-8


def test_further_derivatives_and_transforms():
    gru = fastrnn.GRU(3, 4, dtype=torch.bfloat16)
    x = torch.randn(5, 2, 3).bfloat16().requires_grad_()
    y, _ = gru(x)
    (g,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    twice = torch.autograd.grad(g.float().square().sum(), [x, *gru.parameters()])
    exact = copy.deepcopy(gru).double()
    x64 = x.detach().double().requires_grad_()
    (g64,) = torch.autograd.grad(exact(x64)[0].square().sum(), x64, create_graph=True)
    right = torch.autograd.grad(g64.square().sum(), [x64, *exact.parameters()])
    assert max(error(twice, right)) < 0.1
    mapped = torch.func.vmap(lambda v: gru(v)[0], in_dims=1, out_dims=1)(x.unsqueeze(2))
    assert max(error([mapped.squeeze(2)], [y.double()])) < 0.02
    _, tangent = torch.func.jvp(lambda v: gru(v)[0], (x.detach(),), (torch.ones_like(x),))
    assert tangent.dtype is torch.bfloat16


def test_compiled_and_exported():
    lstm = fastrnn.LSTM(3, 4, dtype=torch.bfloat16)
    x = torch.randn(5, 2, 3).bfloat16()
    expected = results(lstm, x, torch.bfloat16)
    compiled = torch.compile(lstm, backend="aot_eager", fullgraph=True)
    for a, b in zip(results(compiled, x, torch.bfloat16), expected, strict=True):
        assert max(error(a, [t.double() for t in b])) < 0.03
    program = torch.export.export(lstm.eval(), (x,))
    assert max(error([program.module()(x)[0]], [lstm(x)[0].double()])) < 0.02


def test_outputs_changed_in_place_and_hooks_that_hold_what_is_saved():
    lstm = fastrnn.LSTM(24, 40, dtype=torch.bfloat16)
    x = torch.randn(12, 9, 24).bfloat16()
    expected = torch.autograd.grad(lstm(x)[0].mul(2).sum(), list(lstm.parameters()))
    y, _ = lstm(x)
    y.mul_(2)
    for a, b in zip(torch.autograd.grad(y.sum(), list(lstm.parameters())), expected, strict=True):
        assert torch.equal(a, b)
    with torch.autograd.graph.save_on_cpu():
        y = lstm(x)[0].mul(2)
    for a, b in zip(torch.autograd.grad(y.sum(), list(lstm.parameters())), expected, strict=True):
        assert torch.equal(a, b)


def test_explain_says_what_is_multiplied():
    module, x = fastrnn.LSTM(3, 4, dtype=torch.bfloat16), torch.zeros(5, 2, 3, dtype=torch.bfloat16)
    (line,) = fastrnn.explain(module, x)
    assert line.operator == "fastrnn::lstm"
    assert (f"products of bfloat16 ({HAS})" if HAS else "in float32") in line.forward
    (line,) = fastrnn.explain(module.half(), x.half())
    assert "in float32" in line.forward
    for T, rounds in ((8, False), (9, HAS)):  # with two rows a step: autocast rounds the matrices from 17 on
        with torch.autocast("cpu", torch.bfloat16):
            (line,) = fastrnn.explain(fastrnn.LSTM(3, 4), torch.zeros(T, 2, 3))
        assert ("products of bfloat16" in line.forward) == bool(rounds)


SCRIPT = """
import sys, torch, fastrnn
torch.manual_seed(0)
torch.set_num_threads(int(sys.argv[2]))
print(torch.ops.fastrnn.cpu_bfloat16())
found = []
kinds = ("LSTM", {"bidirectional": True}), ("LSTM", {"proj_size": 24}), ("GRU", {}), ("RNN", {})
for kind, options in kinds:
    for B in (1, 3, 40):
        module = getattr(fastrnn, kind)(65, 72, **options, dtype=torch.bfloat16)
        x = torch.randn(10, B, 65).bfloat16().requires_grad_()
        y, _ = module(x)
        found += [y, *torch.autograd.grad(y.float().square().sum(), [x, *module.parameters()])]
torch.save(found, sys.argv[1])
"""


def test_every_kind_of_instructions_and_thread_count_gives_the_same(tmp_path):
    found = []
    for products in ("0", *PRODUCTS):
        for threads in ("1", "3"):
            process = start(SCRIPT, str(tmp_path / "found"), threads, FASTRNN_CPU_BFLOAT16=products)
            output = finish(process)
            if process.returncode:
                assert "not available on this processor" in output
                continue
            assert output.split()[-1:] == [products] or products == "0"
            found.append(torch.load(tmp_path / "found"))
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            assert ((a.double() - b.double()).norm() / b.double().norm()) < 0.02


def test_products_that_the_processor_has_not_are_refused():
    output = finish(start("import fastrnn; fastrnn.LSTM(3, 4)", FASTRNN_CPU_BFLOAT16="mmx"))
    assert "FASTRNN_CPU_BFLOAT16=mmx is unknown or not available" in output
    script = "import torch, fastrnn; print(torch.ops.fastrnn.cpu_bfloat16() or 'none')"
    assert finish(start(script, isa="baseline")).split()[-1] == "none"
    scan, _ = make("gru", 2, 3, 4)
    given = fastrnn._operators.given(scan.slots)
    dgates, y, rows = torch.zeros(1, 6, 16), torch.zeros(6, 4), (None, None, None, False)
    with pytest.raises(RuntimeError, match="gradients of bfloat16 weights are products of torch's"):
        torch.ops.fastrnn.weight_gradients("gru", dgates, scan.x, y, scan.states, *given, *rows, True, True)
