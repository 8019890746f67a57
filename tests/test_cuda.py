"""On a CUDA device: modules and operators against float64 on the CPU, and what only a device has.

Skipped where there is no device or no kernel; with FAIL_WITHOUT_CUDA=1 they fail there. What needs no device
in a test also runs without one: FASTRNN_TEST_DEVICE=cpu takes the CPU's kernels, FASTRNN_TEST_DEVICE=host the
CUDA kernels on the CPU.
"""

import os
import warnings
from dataclasses import dataclass, field, replace

import parity
import pytest
import test_cuda_kernels as kernels
import torch
from parity import Configuration
from scans import CELL_NAMES, FORMS, make_scan
from torch import nn

import fastrnn
from fastrnn import _cuda, _operators, functional

WHERE = os.environ.get("FASTRNN_TEST_DEVICE", "cuda")
DEVICE = "cuda" if WHERE == "cuda" else "cpu"
on_device = pytest.mark.skipif(WHERE != "cuda", reason="needs a CUDA device")
H200 = kernels.H200

# ||found - float64|| / ||float64|| of outputs, states and gradients, over the few steps of these tests.
LIMITS = {"f64": 1e-11, "f32": 2e-5, "tf32": 6e-3, "bf16": 4e-2, "f16": 6e-3}
DTYPES = {name: dtype for name, (dtype, *_) in kernels.NUMBERS.items()}
NUMBERS = ["f32", "f64"] if WHERE == "cpu" else list(LIMITS)
NARROW = "f32" if WHERE == "cpu" else "bf16"


def why_not() -> str | None:
    if WHERE != "cuda":
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return _cuda.no_kernel_reason(torch.empty(0, device="cuda"))


@pytest.fixture(autouse=True)
def kernels_or_nothing(request, monkeypatch):
    """Strict mode, so that nothing takes torch's path unseen; float32 is exact unless a test says tf32."""
    if reason := why_not():
        (pytest.fail if os.environ.get("FAIL_WITHOUT_CUDA") == "1" else pytest.skip)(reason)
    if WHERE == "host":
        request.getfixturevalue("on_host")
        host_kernels(monkeypatch)
    monkeypatch.setattr(functional, "_strict", True)
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.rnn.fp32_precision = before


def host_kernels(monkeypatch) -> None:
    """The CUDA kernels on the CPU, as those of an H200, in the place of the CPU's."""

    def on_h200(operator):
        def call(*arguments):
            kernels.HOST.configure(torch.backends.cudnn.rnn.fp32_precision == "tf32", *H200, True, 0, 0)
            return operator(*arguments)

        return call

    monkeypatch.setattr(functional, "_KERNEL_DTYPES", tuple(set(DTYPES.values())))
    monkeypatch.setattr(_operators, "scan", on_h200(kernels.HOST.scan))
    monkeypatch.setattr(_operators, "scan_backward", on_h200(kernels.HOST.scan_backward.default))
    monkeypatch.setattr(_operators, "scan_backward_over", on_h200(kernels.HOST.scan_backward.over))
    monkeypatch.setattr(_operators, "weight_gradients", _operators.composed_weight_gradients)
    monkeypatch.setattr(_operators, "linear_scan", on_h200(kernels.HOST.linear_scan.default))


def compute_in(numbers: str) -> torch.dtype:
    torch.backends.cudnn.rnn.fp32_precision = "tf32" if numbers == "tf32" else "ieee"
    return DTYPES[numbers]


def errors(found: dict, exact: dict) -> dict[str, float]:
    """||found - exact|| / ||exact|| by name. A tensor of less than 8 numbers may be small by cancellation, so
    its error is divided by the largest of all norms."""
    assert found.keys() == exact.keys()
    norms = {name: exact[name].detach().double().norm().item() for name in exact}
    result = {}
    for name in exact:
        a, b = found[name].detach().cpu().double(), exact[name].detach().cpu().double()
        assert a.shape == b.shape, name
        scale = norms[name] if b.numel() >= 8 else max(norms.values())
        result[name] = float((a - b).norm()) / max(scale, 1e-3)
    return result


def assert_close(numbers: str, found: dict, exact: dict) -> None:
    wrong = {name: error for name, error in errors(found, exact).items() if not error <= LIMITS[numbers]}
    assert not wrong, f"relative errors above {LIMITS[numbers]:.0e}: {wrong}"


def check_module(config: Configuration, numbers: str) -> None:
    """fastrnn on the device in this number type against torch.nn in float64, both from the same rounded
    weights and inputs. An error beyond the limit may be up to three times torch.nn's own in the same type:
    the derivatives of saturated units are small, and rounding leaves few digits of them."""
    dtype = compute_in(numbers)
    theirs, ours = parity.make_modules(config)
    ours = ours.to(DEVICE, dtype)
    theirs.load_state_dict({name: t.to(torch.float64) for name, t in ours.state_dict().items()})
    found = parity.run(ours, config, dtype, DEVICE)
    assert all(t.dtype is dtype and t.device.type == DEVICE for n, t in found.items() if n != "random")
    exact = parity.run(theirs, config, rounding=dtype)
    wrong = {name: error for name, error in errors(found, exact).items() if not error <= LIMITS[numbers]}
    if wrong:
        theirs.dropout = 0.0
        theirs.to(DEVICE, dtype).train()  # cuDNN has no backward in eval mode
        bounds = errors(parity.run(theirs, config, dtype, DEVICE), exact)
        wrong = {name: (error, bounds[name]) for name, error in wrong.items() if error > 3 * bounds[name]}
    assert not wrong, f"relative errors, and torch.nn's: {wrong}"


# ---- Modules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", range(8))
@pytest.mark.parametrize("numbers", NUMBERS)
def test_random_modules_equal_torch_nn(numbers, chunk):
    """Every module, option, form of input and state, and every gradient; two libraries share no dropout."""
    for seed in range(10 * chunk, 10 * chunk + 10):
        config = replace(parity.draw(2_000_000 + seed, large=WHERE == "cuda"), eval_mode=True)
        try:
            check_module(config, numbers)
        except AssertionError as error:
            raise AssertionError(f"{config}: {error}") from error


@dataclass(frozen=True)
class Path:
    """A layer, and what explain says of its scans on an H200."""

    kind: str
    numbers: str
    T: int
    B: int
    H: int
    forward: str
    backward: str
    options: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        options = "".join(f"-{name}{value}" for name, value in self.options.items())
        return f"{self.kind}-{self.numbers}-{self.T}x{self.B}x{self.H}{options}"

    def config(self) -> Configuration:
        options = {"bias": True, "num_layers": 1, "batch_first": False, "bidirectional": False}
        options |= {"nonlinearity": "tanh"} if self.kind == "RNN" else {}
        return Configuration(
            7, self.kind, 24, self.H, options | self.options, self.T, self.B, state="given", eval_mode=True
        )


ONE, MEET, STEPS = "one block has all units", "which meet once a step", "a kernel each step: "
PATHS = [
    Path("LSTM", "bf16", 12, 9, 64, ONE, ONE),
    Path("LSTM", "f32", 12, 9, 90, ONE, ONE),
    Path("GRU", "f16", 12, 33, 120, ONE, ONE),
    Path("RNN", "tf32", 12, 5, 100, ONE, ONE),
    Path("LSTM", "bf16", 12, 16, 200, MEET, MEET),
    Path("GRU", "f32", 8, 17, 200, MEET, MEET),
    Path("LSTM", "bf16", 12, 33, 300, MEET, MEET, {"bidirectional": True, "num_layers": 2}),
    Path("GRU", "f16", 12, 64, 768, MEET, MEET),
    Path("RNN", "tf32", 12, 64, 1024, MEET, MEET),
    Path("LSTM", "f16", 12, 16, 768, MEET, MEET),
    Path("LSTM", "bf16", 12, 64, 1024, "blocks of 16 units", MEET),
    Path("LSTM", "tf32", 8, 64, 512, MEET, MEET),
    Path("LSTM", "f32", 8, 64, 512, MEET, MEET),
    Path("GRU", "bf16", 6, 256, 256, MEET, MEET),
    Path("LSTM", "bf16", 6, 3, 2048, MEET, MEET),
    Path("LSTM", "f64", 6, 5, 48, STEPS + "float64", STEPS + "float64"),
    Path("LSTM", "bf16", 6, 5, 48, STEPS + "a projection", STEPS + "a projection", {"proj_size": 16}),
    Path("GRU", "f32", 1, 5, 48, STEPS + "one step", STEPS + "one step"),
    Path("LSTM", "f32", 3, 3, 2600, STEPS + "no room", STEPS + "no room"),
]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_every_path_equals_torch_nn(path):
    if WHERE != "cuda" and (path.numbers not in NUMBERS or path.H > 200):
        pytest.skip("too slow, or not there, without a device")
    dtype = compute_in(path.numbers)
    if WHERE == "cuda" and torch.cuda.get_device_properties(0).multi_processor_count == H200[0]:
        module = getattr(fastrnn, path.kind)(24, path.H, **path.options).to(DEVICE, dtype)
        for found in fastrnn.explain(module, torch.zeros(path.T, path.B, 24, device=DEVICE, dtype=dtype)):
            assert (path.forward in found.forward, path.backward in found.backward) == (True, True), found
    check_module(path.config(), path.numbers)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("numbers", ["f32", NARROW])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LSTM", {}),
        ("LSTM", {"peephole": True}),
        ("LSTM", {"coupled": True}),
        ("LSTM", {"layer_norm": True}),
        ("GRU", {}),
        ("RNN", {}),
        ("IndRNN", {}),
        ("SLSTM", {"heads": 2}),
        ("LayerNormGRU", {"bias": True, "heads": 2}),
        ("LayerNormGRU", {"norm": "rms"}),
        ("GRU", {"layer_norm": True}),
        ("MinGRU", {}),
        ("SRU", {}),
    ],
)
def test_lengths_resets_and_every_state(kind, options, numbers, bidirectional, batch_first, monkeypatch):
    """Against the CPU's kernels in float64, which have tests of their own."""
    T, B, I, H, dtype = 7, 6, 5, 40, compute_in(numbers)
    torch.manual_seed(3)
    options = options | {"batch_first": batch_first, "bidirectional": bidirectional}
    module = getattr(fastrnn, kind)(I, H, 2, **options).to(dtype)
    shape = (B, T) if batch_first else (T, B)
    x, reset = torch.randn(*shape, I).to(dtype), torch.rand(shape) < 0.2
    lengths = torch.tensor([7, 0, 3, 5, 1, 7])

    def run(device: str, dtype: torch.dtype) -> dict:
        there = module.to(device, dtype)
        leaf = x.to(device, dtype).requires_grad_()
        y, states = there(leaf, lengths=lengths, reset=reset.to(device), return_states=True)
        outputs = [y, *(states if isinstance(states, tuple) else (states,))]
        loss = sum((o * torch.linspace(-1, 1, o.numel()).view(o.shape).to(o)).sum() for o in outputs)
        gradients = torch.autograd.grad(loss, [leaf, *there.parameters()])
        return dict(enumerate((*outputs, *gradients)))

    found = run(DEVICE, dtype)
    monkeypatch.undo()  # back to the CPU's own kernels
    assert_close(numbers, found, run("cpu", torch.float64))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "MinGRU"])
def test_derivatives_are_those_of_the_function(kind):
    """gradcheck and gradgradcheck in float64, of a ragged sequence in both directions."""
    module = getattr(fastrnn, kind)(2, 3, bidirectional=True, dtype=torch.float64).to(DEVICE)
    x = torch.randn(3, 2, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    names, weights = zip(*module.named_parameters(), strict=True)

    def function(x, *weights):
        parameters = dict(zip(names, weights, strict=True))
        options = {"lengths": torch.tensor([3, 2])}
        y, states = torch.func.functional_call(module, parameters, (x,), options)
        return (y, *(states if isinstance(states, tuple) else (states,)))

    assert torch.autograd.gradcheck(function, (x, *weights))
    assert torch.autograd.gradgradcheck(function, (x, *weights))


@pytest.mark.parametrize("sizes", [(1000, 3, 40), (70, 40, 129)], ids=str)
@pytest.mark.parametrize("numbers", [numbers for numbers in NUMBERS if numbers != "tf32"])
def test_a_linear_scan_in_chunks(numbers, sizes, monkeypatch):
    """Against the CPU's kernels in float64, which have tests of their own."""
    T, B, H, dtype = *sizes, DTYPES[numbers]
    a, b = torch.rand(T, B, H).to(dtype), torch.randn(T, B, H).to(dtype)
    h0, reset, lengths = torch.randn(B, H).to(dtype), torch.rand(T, B) < 0.01, torch.randint(0, T + 1, (B,))

    def run(device: str, dtype: torch.dtype) -> dict:
        leaves = [t.to(device, dtype).requires_grad_() for t in (a, b, h0)]
        results = {}
        for options in ({}, {"reverse": True, "lengths": lengths, "reset": reset.to(device)}):
            h = functional.linear_scan(*leaves, **options)
            weights = torch.linspace(-1, 1, h.numel(), device=device).view(h.shape).to(dtype)
            gradients = torch.autograd.grad(h, leaves, weights)
            results |= {f"{name} {list(options)}": t for name, t in zip("habm", (h, *gradients), strict=True)}
        return results

    found = run(DEVICE, dtype)
    monkeypatch.undo()  # back to the CPU's own kernels
    assert_close(numbers, found, run("cpu", torch.float64))


@pytest.mark.skipif(WHERE == "cpu", reason="tests/test_math.py is about those of the CPU")
@pytest.mark.parametrize("function", ["tanh", "sigmoid"])
def test_activations_are_within_8_ulp_and_exact_at_their_ends(function):
    """tanh as an RNN of one unit; sigmoid as the update gate of a GRU whose new gate is 0 and h was 1."""
    numbers = torch.logspace(-30, 2.3, 4000)
    # An infinite input times a weight of 0 would make the other gates NaN.
    end = 3e38 if function == "sigmoid" else torch.inf
    ends = torch.tensor([0.0, end, torch.nan, 1e30, 88.0, 89.0, 104.0])
    x = torch.cat((numbers, -numbers, ends, -ends)).to(DEVICE)
    module = (fastrnn.RNN if function == "tanh" else fastrnn.GRU)(1, 1, bias=False).to(DEVICE)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.weight_ih_l0[1 if function == "sigmoid" else 0] = 1
        y, _ = module(x.view(1, -1, 1).expand(2, -1, 1), x.new_ones(1, len(x), 1))
    exact = getattr(torch, function)(x.double()).cpu()
    found = y[0, :, 0].cpu()
    assert torch.equal(found.isnan(), exact.isnan())
    rounded = exact.float()
    ulp = (torch.nextafter(rounded.abs(), torch.tensor(torch.inf)) - rounded.abs()).double()
    # Products of smallest numbers are flushed to 0 on the device.
    error = ((found.double() - exact).abs() - 1e-37).clamp_min(0) / ulp
    assert error[~exact.isnan()].max() <= 8
    for value in (end, -end):
        assert torch.equal(found[x.cpu() == value], rounded[x.cpu() == value])


@pytest.mark.parametrize("numbers", ["f32", NARROW])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_results_repeat_bit_for_bit(kind, numbers):
    H, B = (300, 33) if WHERE == "cuda" else (72, 9)
    module = getattr(fastrnn, kind)(20, H).to(DEVICE, compute_in(numbers))
    x = torch.randn(20, B, 20).to(module.weight_hh_l0)

    def run():
        y = module(x)[0]
        return [y, *torch.autograd.grad(y.float().square().sum(), list(module.parameters()))]

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(WHERE == "host", reason="the operators of the host have no shapes for tracing")
def test_a_traced_module_gives_the_same():
    module = fastrnn.LSTM(6, 20, 2, bidirectional=True).to(DEVICE)
    x = torch.randn(5, 3, 6, device=DEVICE)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@on_device
def test_autocast_computes_in_its_dtype(kind, dtype):
    theirs, ours = getattr(nn, kind)(6, 20).cuda(), getattr(fastrnn, kind)(6, 20).cuda()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(*((3, 6) if kind.endswith("Cell") else (5, 3, 6)), device=DEVICE)
    with torch.autocast("cuda", dtype):
        found, expected = (torch.utils._pytree.tree_leaves(m(x)) for m in (ours, theirs))
    for a, b in zip(found, expected, strict=True):
        # torch.nn's layers, not its cells, take float16 whatever was asked for (cudnn/AutocastRNN.cpp).
        assert a.dtype is dtype
        assert b.dtype in (dtype, torch.float16)
        torch.testing.assert_close(a, b.to(dtype), rtol=5e-2, atol=2e-2)


# ---- Errors ------------------------------------------------------------------------------------------


def complaint(module, *arguments) -> tuple[type, str]:
    with pytest.raises((RuntimeError, ValueError)) as caught:
        module(*arguments)
    return caught.type, str(caught.value).split(", found")[0]  # it goes on with dtypes and devices


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_mixed_dtypes_and_devices_are_refused_in_torch_nns_words(kind):
    theirs, ours = (getattr(library, kind)(3, 4).to(DEVICE) for library in (nn, fastrnn))
    x, h = torch.randn(5, 2, 3, device=DEVICE), torch.randn(1, 2, 4, device=DEVICE)

    def states(h):
        return (h, h) if kind == "LSTM" else h

    mixed = [(x.double(), states(h))]
    if WHERE == "cuda":  # of these torch.nn's CPU path complains in other words
        mixed += [(x, states(h.double())), (x.cpu(), states(h.cpu())), (x, states(h.cpu()))]
    for arguments in mixed:
        assert complaint(ours, *arguments) == complaint(theirs, *arguments)


@on_device
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
def test_a_cell_refuses_mixed_devices(kind):
    module = getattr(fastrnn, kind)(3, 4).cuda()
    assert complaint(module, torch.randn(2, 3))[0] is RuntimeError


# ---- Streams, graphs, threads ------------------------------------------------------------------------


@on_device
def test_kernels_run_on_the_current_stream():
    """The input arrives late on a stream of its own: kernels on another one would read it too early."""
    module = fastrnn.LSTM(64, 300).to("cuda", torch.bfloat16)
    x = torch.randn(20, 8, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = module(x)[0].clone()
        late = torch.zeros_like(x)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # cycles: some 50 ms
            late.copy_(x)
            found = module(late)[0]
        stream.synchronize()
    assert torch.equal(found, expected)


@on_device
@pytest.mark.parametrize("path", ["one block", "many blocks", "each step"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_cuda_graph_replays_forward_and_backward(kind, path):
    H, dtype = {"one block": (64, torch.bfloat16), "many blocks": (300, torch.bfloat16),
                "each step": (64, torch.float64)}[path]  # fmt: skip
    module = getattr(fastrnn, kind)(32, H, 2).to("cuda", dtype)
    x = torch.randn(10, 8, 32, device="cuda", dtype=dtype, requires_grad=True)
    leaves = [x, *module.parameters()]

    def step():
        y = module(x)[0]
        return y, torch.autograd.grad(y, leaves, torch.ones_like(y))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y, gradients = step()
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        expected, expected_gradients = step()
        for a, b in zip((y, *gradients), (expected, *expected_gradients), strict=True):
            torch.testing.assert_close(a, b)


@on_device
def test_lengths_cannot_be_captured_and_say_so():
    module, x = fastrnn.LSTM(8, 16).cuda(), torch.randn(5, 3, 8, device="cuda")

    def capture():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            module(x, lengths=[5, 3, 1])

    with torch.no_grad():
        module(x, lengths=[5, 3, 1])  # what a first call prepares is not to be captured
        with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
            capture()


# ---- Operators ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RealDevice(kernels.Device):
    """The CUDA operators themselves, in the place of those that run on the host."""

    where: str = "cuda"
    operators = torch.ops.fastrnn

    def take(self, numbers: str) -> None:
        compute_in(numbers)


REAL = RealDevice()


@on_device
@pytest.mark.parametrize("H", [65, 300])
@pytest.mark.parametrize("numbers", LIMITS)
@pytest.mark.parametrize("cell", CELL_NAMES)
def test_operators_equal_the_reference(cell, numbers, H):
    kernels.run(REAL, numbers, make_scan(cell, 4, 9, H))


@on_device
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("H", [33, 200])
@pytest.mark.parametrize("cell", CELL_NAMES)
def test_operators_take_every_form_in_both_directions(cell, H, form):
    for numbers in ("f32", "bf16", "f64"):
        kernels.run(REAL, numbers, make_scan(cell, 5, 11, H, D=2, **FORMS[form]))


@on_device
@pytest.mark.parametrize("form", ["time_major", "lengths_batch_first", "packed"])
@pytest.mark.parametrize("numbers", LIMITS)
def test_operators_project(numbers, form):
    kernels.run(REAL, numbers, make_scan("lstm", 4, 5, 17, D=2, P=7, **FORMS[form]))


@on_device
@pytest.mark.parametrize("cell", CELL_NAMES)
def test_operators_without_bias_and_with_few_gradients(cell):
    for H in (20, 200):
        kernels.run(REAL, "f32", make_scan(cell, 4, 3, H, bias=False), wanted="y", save=0)
        kernels.run(REAL, "f32", make_scan(cell, 4, 3, H), wanted="h")


def test_nothing_took_the_path_of_torch():
    """The tests above run in strict mode; this one says that strict mode would notice."""
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="strict mode"):
        fastrnn.LSTM(2, 3, dtype=torch.complex64)(torch.zeros(1, 1, 2, dtype=torch.complex64))
