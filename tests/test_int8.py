"""prepack(weights=torch.int8): the kernels against the same rounding written out in torch, in float64."""

import copy

import pytest
import torch
from scans import CELL_NAMES, FORMS, make_scan
from test_isa_threads import finish, start
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import step_options
from fastrnn._operators import given
from fastrnn.reference import CELLS

PRODUCTS = ("amx", "avx512_vnni", "avx2", "portable")


def rounded(rows):
    """The float64 numbers that int8 rows stand for: each row's largest magnitude is 127 times its scale."""
    x = rows.detach().float()
    if x.numel() == 0:
        return x.double()
    largest = x.abs().amax(-1, keepdim=True)
    largest = torch.where(largest < float("inf"), largest.clamp(min=2.0**-100), torch.nan)
    scale, inverse = largest / 127, torch.full_like(largest, 127) / largest
    return (x * inverse).round().double() * scale.double()


@pytest.fixture
def rounded_h(monkeypatch):
    """The reference rounds h before its product, as the kernels do."""
    masked = step_options.StepOptions.masked
    monkeypatch.setattr(step_options.StepOptions, "masked", lambda self, h: rounded(masked(self, h)))


def pack(scan):
    return torch.ops.fastrnn.pack(scan.name, *given(scan.slots), "int8")


def emulated(scan):
    """The scan in float64 with what int8 makes of its matrices and of x; rounded_h does the rest."""
    exact = scan.to("cpu", torch.float64)
    for part in ("w_ih", "w_hh", "w_hr"):
        setattr(exact, part, [rounded(w) for w in getattr(scan, part)])
    if not CELLS[scan.name].takes_gates:
        exact.x = rounded(scan.x)
    return exact


def close(found, expected, **keywords):
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5, **keywords)


SIZES = [(1, 1, 1), (1, 5, 3), (3, 2, 7), (4, 17, 16), (2, 33, 31), (5, 48, 32), (40, 1, 20), (6, 70, 65),
         (2, 3, 129)]  # fmt: skip


@pytest.mark.parametrize("name", CELL_NAMES)
@pytest.mark.parametrize(("T", "B", "H"), SIZES)
def test_every_step_is_the_emulation_from_the_state_before_it(name, T, B, H, rounded_h):
    for D, I in ((1, 67), (2, 5)):
        scan = make_scan(name, T, B, H, D=D, I=I, dtype=torch.float32)
        y, *_, history = scan.kernel(2, pack(scan))
        for d, h, one in scan.each_step(y, history):
            close(h, emulated(one).reference()[0].view(B, D, H)[:, d])


@pytest.mark.parametrize(("T", "B", "H", "P"), [(1, 1, 5, 3), (1, 7, 40, 33), (1, 40, 33, 16)])
def test_a_projection_rounds_what_it_multiplies(T, B, H, P):
    scan = make_scan("lstm", T, B, H, P=P, dtype=torch.float32)
    exact = emulated(scan)
    a = exact.x @ exact.w_ih[0].T + exact.b_ih[0] + rounded(scan.h0[0]) @ exact.w_hh[0].T + exact.b_hh[0]
    i, f, g, o = a.chunk(4, -1)
    c = f.sigmoid() * exact.c0[0] + i.sigmoid() * g.tanh()
    y, _, c_n, *_ = scan.kernel(0, pack(scan))
    close(c_n[0], c)
    # m is not an output: where it lies between two integers, the kernel may take the other one.
    step = (o.sigmoid() * c.tanh()).abs().amax(-1, keepdim=True) / 127
    expected = rounded(o.sigmoid() * c.tanh()) @ exact.w_hr[0].T
    assert ((y - expected).abs() <= 1e-5 + step * exact.w_hr[0].abs().max()).all()
    assert (y - expected).abs().median() < 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["lstm", "gru", "lstm_layer_norm"])
def test_every_form_is_the_emulation(name, form, rounded_h):
    scan = make_scan(name, 5, 6, 18, D=2, I=9, dtype=torch.float32, **FORMS[form])
    y, *_ = scan.kernel(0, pack(scan))
    expected = emulated(scan).reference()[0]
    # A number between two integers may go to the other one, which later steps inherit.
    assert (y - expected).abs().max() < 0.02
    assert (y - expected).abs().median() < 1e-6
    assert (y - scan.kernel(0)[0]).abs().max() > 1e-3  # what int8 itself makes of the numbers


@pytest.mark.parametrize("stepwise", [False, True])
def test_options_of_the_steps_act_beside_int8(stepwise):
    torch.manual_seed(0)
    module = fastrnn.LSTM(8, 8, zoneout=0.3, recurrent_dropout=0.2, cell_clip=0.5).eval()
    x, reset = torch.randn(9, 4, 8), torch.rand(9, 4) < 0.3
    state = torch.randn(*([9] if stepwise else []), 1, 4, 8)
    to = (state, state)
    with torch.no_grad():
        expected, _ = module(x, reset=reset, reset_to=to)
        fastrnn.prepack(module, torch.int8)
        found, _ = module(x, reset=reset, reset_to=to)
    assert 1e-6 < (found - expected).abs().max() < 0.02


# ---- What is no ordinary number ----------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("B", [1, 2, 20])
def test_nan_and_infinity_make_their_row_nan_and_no_other(value, B):
    scan = make_scan("gru", 4, B, 40, I=70, dtype=torch.float32)
    packed, clean = pack(scan), scan.kernel(0, pack(scan))[0].view(4, B, 40)
    scan.x = scan.x.clone()
    scan.x.view(4, B, 70)[2, 0, 69] = value
    y = scan.kernel(0, packed)[0].view(4, B, 40)
    assert y[2:, 0].isnan().all()
    assert torch.equal(y[:2], clean[:2])
    assert torch.equal(y[:, 1:], clean[:, 1:])
    scan = make_scan("gru", 1, B, 40, dtype=torch.float32)
    scan.h0[0, B - 1, 0] = value
    y = scan.kernel(0, packed := pack(scan))[0]
    assert y[B - 1].isnan().all()
    assert not y[: B - 1].isnan().any()
    scan.h0[0, B - 1, 0] = 0
    scan.w_hh[0][5, 3] = value
    y = scan.kernel(0, pack(scan))[0]
    assert y[:, 5].isnan().all()
    assert not y[:, :5].isnan().any()
    assert packed.numel()


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-20, 1e20, 1e36])
def test_rows_of_any_size(size, rounded_h):
    scan = make_scan("rnn_relu", 1, 3, 20, I=30, dtype=torch.float32)
    scan.x *= size
    y, expected = scan.kernel(0, pack(scan))[0], emulated(scan).reference()[0]
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_are_exact_and_larger_ones_are_refused(sign):
    most = (2**31 - 1) // 127**2
    module = fastrnn.RNN(most, 1, nonlinearity="tanh", bias=False).eval()
    with torch.no_grad():
        module.weight_ih_l0.fill_(sign * 0.5 / most)
        fastrnn.prepack(module, torch.int8)
        y, _ = module(torch.ones(1, 7, most))
    torch.testing.assert_close(y, torch.full_like(y, 0.5 * sign).tanh())
    with pytest.raises(RuntimeError, match=f"int8 weights are for sizes up to {most}, got {most + 1}"):
        fastrnn.prepack(fastrnn.RNN(most + 1, 1).eval(), torch.int8)


# ---- Modules -----------------------------------------------------------------------------------------

MODULES = {
    "lstm": lambda: fastrnn.LSTM(6, 40, 2, bidirectional=True),
    "projection": lambda: fastrnn.LSTM(6, 40, proj_size=12),
    "gru": lambda: fastrnn.GRU(6, 40, batch_first=True, bias=False),
    "rnn": lambda: fastrnn.RNN(6, 40, nonlinearity="relu"),
    "peephole": lambda: fastrnn.LSTM(6, 40, peephole=True),
}


class ByOperators(TorchDispatchMode):
    """Calls that see torch's operators do not go past the dispatcher."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize(("T", "B"), [(1, 1), (7, 1), (4, 20)])
def test_modules_are_near_float32_and_short_calls_take_the_pack_too(kind, T, B):
    torch.manual_seed(0)
    module = MODULES[kind]().eval()
    x = torch.randn(*((B, T) if module.batch_first else (T, B)), 6)
    with torch.no_grad():
        before = module(x)[0]
        assert fastrnn.prepack(module, weights=torch.int8) is module
        after = module(x)[0]
        with ByOperators():
            assert torch.equal(module(x)[0], after)
    assert 1e-5 < (after - before).abs().max() < 0.05
    assert "prepacked as int8" in fastrnn.explain(module, x)[-1].forward


def test_a_stream_of_steps_is_the_whole_sequence():
    torch.manual_seed(0)
    module, cell = fastrnn.LSTM(9, 33).eval(), fastrnn.LSTMCell(9, 33).eval()
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in module.state_dict().items()})
    fastrnn.prepack(module, torch.int8), fastrnn.prepack(cell, torch.int8)
    x, state, steps = torch.randn(6, 3, 9), None, []
    with torch.inference_mode():
        for t in range(6):
            state = cell(x[t], state)
            steps.append(state[0])
        torch.testing.assert_close(torch.stack(steps), module(x)[0], rtol=1e-5, atol=1e-5)


def test_an_empty_batch_and_lengths_of_zero():
    module = fastrnn.LSTM(6, 40).eval()
    x = torch.randn(5, 3, 6)
    with torch.no_grad():
        fastrnn.prepack(module, torch.int8)
        y, (h, c) = module(x[:, :0])
        assert y.shape == (5, 0, 40)
        assert h.shape == c.shape == (1, 0, 40)
        y, _ = module(x, lengths=torch.tensor([5, 0, 2]))
        whole, _ = module(x)
    assert torch.equal(y[:, 0], whole[:, 0])
    assert torch.equal(y[:2, 2], whole[:2, 2])
    assert not y[:, 1].any()


def test_a_pack_of_int8_is_undone_and_replaced_like_others():
    module, x = fastrnn.GRU(6, 40).eval(), torch.randn(5, 3, 6)
    plain = copy.deepcopy(module)
    with torch.no_grad():
        fastrnn.prepack(module, torch.int8)
        first = module(x)[0]
        assert not torch.equal(first, plain(x)[0])
        fastrnn.prepack(module)
        torch.testing.assert_close(module(x)[0], plain(x)[0])
        fastrnn.prepack(module, torch.int8)
        assert torch.equal(module(x)[0], first)
    assert module.train() is module
    torch.testing.assert_close(module(x)[0], plain(x)[0])
    with pytest.raises(
        ValueError, match=r"weights=torch\.int8 is for float32 modules, GRU has torch.float64"
    ):
        fastrnn.prepack(copy.deepcopy(plain).double(), torch.int8)
    with pytest.raises(ValueError, match=r"must be None, torch\.bfloat16 or torch\.int8, got torch\.uint8"):
        fastrnn.prepack(plain, torch.uint8)
    scan = make_scan("gru", 1, 1, 3, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="stored as bfloat16 or int8, not as int4"):
        torch.ops.fastrnn.pack("gru", *given(scan.slots), "int4")


def test_int8_packs_are_a_quarter_of_float32():
    weights = given(make_scan("lstm", 1, 1, 512, I=512, dtype=torch.float32).slots)
    whole, small = (torch.ops.fastrnn.pack("lstm", *weights, storage).numel() for storage in ("", "int8"))
    assert small < 0.27 * whole


# ---- Every processor, every number of threads --------------------------------------------------------

SCRIPT = """
import sys, torch, fastrnn
torch.set_num_threads(int(sys.argv[2]))
torch.manual_seed(0)
results = [torch.ops.fastrnn.cpu_int8()]
for make in (fastrnn.LSTM, fastrnn.GRU, lambda *sizes: fastrnn.LSTM(*sizes, proj_size=37)):
    for I, H, T, B in ((70, 200, 1, 1), (9, 65, 1, 3), (128, 96, 1, 40), (33, 129, 12, 5), (64, 300, 40, 1)):
        module = fastrnn.prepack(make(I, H).eval(), torch.int8)
        with torch.no_grad():
            results.append(module(torch.randn(T, B, I))[0])
torch.save(results, sys.argv[1])
"""
RUNS = [("avx512", p) for p in PRODUCTS] + [("avx2", "avx2"), ("avx2", "portable"), ("baseline", "portable")]


def test_all_products_and_threads_agree(tmp_path):
    found = {}
    for isa, products in RUNS:
        for threads in ("1", "2", "5"):
            path = tmp_path / "found"
            process = start(SCRIPT, str(path), threads, isa=isa, FASTRNN_CPU_INT8=products)
            output = finish(process)
            if process.returncode:
                assert "not available on this processor" in output, output
                continue
            name, *results = torch.load(path)
            assert name == products
            found[isa, products, threads] = results
    first, *others = found.values()
    assert len(found) >= 3
    for results in others:
        for a, b in zip(first, results, strict=True):
            # The integers are the same; a rounding of float32 may send a later state to its neighbour.
            assert (a - b).abs().max() < (2e-6 if len(a) == 1 and a.shape[2] != 37 else 0.02)
            assert (a - b).abs().median() < 1e-6


def test_an_unknown_override_is_refused_loudly():
    script = "import torch, fastrnn; fastrnn.prepack(fastrnn.LSTM(3, 4).eval(), torch.int8)"
    process = start(script, FASTRNN_CPU_INT8="mmx")
    output = finish(process)
    assert process.returncode != 0
    assert "FASTRNN_CPU_INT8=mmx is unknown or not available" in output


@pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="torch has no int8 LSTM"
)
def test_beside_torchs_own_quantised_lstm():
    """Our error against float32 is not above that of torch.ao's dynamic quantisation."""
    torch.manual_seed(0)
    theirs = nn.LSTM(64, 256).eval()
    quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(theirs), {nn.LSTM}, dtype=torch.qint8)
    ours = fastrnn.prepack(fastrnn.convert(copy.deepcopy(theirs)), torch.int8)
    x = torch.randn(50, 4, 64)
    with torch.no_grad():
        exact = theirs(x)[0]
        error, other = ((m(x)[0] - exact).norm().item() for m in (ours, quantised))
    assert error < other
