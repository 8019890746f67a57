"""MinGRU, MinLSTM, QRNN and SRU against loops in float64 written from the papers, one sequence and one step
at a time."""

import copy
import pickle

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn

T, B, I, H = 6, 4, 3, 5
sigmoid, tanh = torch.sigmoid, torch.tanh


# A step: the input x [I], the one before, and the state [H] -> (output, state). p: the parameters of one
# layer and direction.


def mingru(p, x, before, h):  # Feng et al. (2024), section 3.1.2
    z, candidate = (p["weight_ih"] @ x + p["bias_ih"]).reshape(2, -1)
    h = (1 - sigmoid(z)) * h + sigmoid(z) * candidate
    return h, h


def minlstm(p, x, before, h):  # Feng et al. (2024), section 3.2.3
    f, i, candidate = (p["weight_ih"] @ x + p["bias_ih"]).reshape(3, -1)
    f, i = sigmoid(f), sigmoid(i)
    h = f / (f + i) * h + i / (f + i) * candidate
    return h, h


def qrnn(p, x, before, c):  # Bradbury et al. (2017), equations 1 and 4
    seen = torch.cat((before, x)) if p["weight_ih"].shape[1] == 2 * len(x) else x
    z, f, o = (p["weight_ih"] @ seen + p["bias_ih"]).reshape(3, -1)
    c = sigmoid(f) * c + (1 - sigmoid(f)) * tanh(z)
    return sigmoid(o) * c, c


def sru(p, x, before, c):  # Lei et al. (2017), arXiv:1709.02755v1, equations 3 to 7
    u, f, r, *skipped = (p["weight_ih"] @ x).reshape(-1, H)
    b_f, b_r = p["bias_ih"].reshape(2, -1)
    f, r = sigmoid(f + b_f), sigmoid(r + b_r)
    c = f * c + (1 - f) * u
    return r * tanh(c) + (1 - r) * (skipped[0] if skipped else x), c


CLASSES = {
    "MinGRU": ({}, mingru),
    "MinLSTM": ({}, minlstm),
    "QRNN": ({}, qrnn),
    "QRNN of two steps": ({"window": 2}, qrnn),
    "SRU": ({}, sru),
}
of_each_class = pytest.mark.parametrize("kind", CLASSES)


def make(kind, dtype=torch.float64, input_size=I, **options):
    return getattr(fastrnn, kind.split()[0])(input_size, H, dtype=dtype, **CLASSES[kind][0], **options)


def by_hand(module, kind, x, h0, lengths=None, reset=None):
    """y [T, B, D*H], the last states [L*D, B, H], and every state [T, L*D, B, H]."""
    step, D = CLASSES[kind][1], 2 if module.bidirectional else 1
    lengths = [len(x)] * x.shape[1] if lengths is None else lengths.tolist()
    last, every = h0.clone(), x.new_zeros(len(x), *h0.shape)
    for layer in range(module.num_layers):
        y = x.new_zeros(*x.shape[:2], D * H)
        for d in range(D):
            suffix = f"_l{layer}" + "_reverse" * d
            p = {name: getattr(module, name + suffix) for name in ("weight_ih", "bias_ih") if module.bias}
            if not module.bias:
                weight = getattr(module, "weight_ih" + suffix)
                p = {"weight_ih": weight, "bias_ih": x.new_zeros(2 * H if kind == "SRU" else len(weight))}
            for b, n in enumerate(lengths):
                state, before = h0[layer * D + d, b], torch.zeros_like(x[0, b])
                for t in range(n - 1, -1, -1) if d else range(n):
                    if reset is not None and reset[t, b]:
                        state, before = torch.zeros_like(state), torch.zeros_like(before)
                    y[t, b, d * H : (d + 1) * H], state = step(p, x[t, b], before, state)
                    before = x[t, b]
                    every[t, layer * D + d, b] = state
                last[layer * D + d, b] = state
        x = y
    return x, last, every


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


OPTIONS = [
    {},
    {"bias": False},
    {"num_layers": 3, "bidirectional": True},
    {"num_layers": 2, "batch_first": True},
    {"input_size": H, "num_layers": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@of_each_class
def test_equals_the_papers_formula(kind, options):
    module = make(kind, **options)
    LD = module.num_layers * (2 if module.bidirectional else 1)
    x = torch.randn(T, B, module.input_size, dtype=torch.float64)
    h0 = torch.randn(LD, B, H, dtype=torch.float64)
    lengths, reset = torch.tensor([6, 0, 3, 1]), torch.rand(T, B) < 0.3

    def turned(t):
        return t.transpose(0, 1) if module.batch_first else t

    for given in ({}, {"lengths": lengths}, {"reset": reset}, {"lengths": lengths, "reset": reset}):
        y, last, every = by_hand(module, kind, x, h0, **given)
        called = given | ({"reset": turned(reset)} if "reset" in given else {})
        found, h_n = module(turned(x), h0, **called)
        close(turned(found), y)
        close(h_n, last)
        found, states = module(turned(x), h0, return_states=True, **called)
        close(turned(found), y)
        close(states, every)


@of_each_class
def test_without_a_state_it_begins_at_zero(kind):
    module, x = make(kind, num_layers=2), torch.randn(T, B, I, dtype=torch.float64)
    zeros = torch.zeros(2, B, H, dtype=torch.float64)
    for found, expected in zip(module(x), module(x, zeros), strict=True):
        assert torch.equal(found, expected)


@of_each_class
def test_an_empty_batch(kind):
    module = make(kind, num_layers=2, bidirectional=True)
    y, h_n = module(torch.randn(T, 0, I, dtype=torch.float64))
    assert (y.shape, h_n.shape) == ((T, 0, 2 * H), (4, 0, H))
    y.sum().backward()
    assert all(p.grad.eq(0).all() for p in module.parameters())


@pytest.mark.parametrize("bidirectional", [False, True])
@of_each_class
def test_packed_sequences_equal_lengths(kind, bidirectional):
    module = make(kind, num_layers=2, bidirectional=bidirectional)
    x, lengths = torch.randn(T, B, I, dtype=torch.float64), torch.tensor([2, 6, 1, 5])
    h0 = torch.randn(4 if bidirectional else 2, B, H, dtype=torch.float64)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, h_n = module(packed, h0)
    assert isinstance(y, PackedSequence)
    expected, last = module(x, h0, lengths=lengths)
    close(pad_packed_sequence(y)[0], expected)
    close(h_n, last)
    ordered = x[:, [1, 3, 0, 2]]
    y, h_n = module(pack_padded_sequence(ordered, lengths[[1, 3, 0, 2]]))
    close(h_n, module(x, lengths=lengths)[1][:, [1, 3, 0, 2]])


@of_each_class
def test_unbatched_input(kind):
    for batch_first in (False, True):
        module = make(kind, num_layers=2, batch_first=batch_first)
        x, h0 = torch.randn(T, I, dtype=torch.float64), torch.randn(2, H, dtype=torch.float64)
        reset = torch.rand(T) < 0.3
        y, h_n = module(x, h0, lengths=4, reset=reset)
        expected, last, every = by_hand(
            module, kind, x[:, None], h0[:, None], torch.tensor([4]), reset[:, None]
        )
        close(y, expected[:, 0])
        close(h_n, last[:, 0])
        _, states = module(x, h0, lengths=4, reset=reset, return_states=True)
        close(states, every[:, :, 0])


@of_each_class
def test_nan_in_the_padding_reaches_nothing(kind):
    module, x = make(kind, bidirectional=True), torch.randn(T, B, I, dtype=torch.float64)
    lengths = torch.tensor([6, 0, 3, 1])
    x[torch.arange(T)[:, None] >= lengths] = float("nan")
    x.requires_grad_()
    y, h_n = module(x, lengths=lengths)
    for t in (y, h_n, *torch.autograd.grad(y.sum() + h_n.sum(), [x, *module.parameters()])):
        assert not t.isnan().any()
    y, _ = module(x, lengths=lengths)
    dy = torch.randn(y.shape, dtype=torch.float64)
    expected = torch.autograd.grad(y, [x, *module.parameters()], dy, retain_graph=True)
    dy[torch.arange(T)[:, None] >= lengths] = float("nan")  # as that of y.log() would be
    torch.testing.assert_close(torch.autograd.grad(y, [x, *module.parameters()], dy), expected)


@pytest.mark.parametrize("bidirectional", [False, True])
@of_each_class
def test_derivatives_equal_differences(kind, bidirectional):
    module = make(kind, bidirectional=bidirectional)
    h0 = torch.randn(2 if bidirectional else 1, 2, H, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 2, I, dtype=torch.float64, requires_grad=True)
    names = list(dict(module.named_parameters()))

    def call(x, h0, *parameters):
        options = {"lengths": torch.tensor([3, 2])}
        return functional_call(module, dict(zip(names, parameters, strict=True)), (x, h0), options)

    inputs = (x, h0, *module.parameters())
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@of_each_class
def test_gradients_for_each_sample(kind):
    module, x = make(kind), torch.randn(5, T, B, I, dtype=torch.float64)
    parameters = dict(module.named_parameters())

    def loss(parameters, x):
        return functional_call(module, parameters, (x,))[0].square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for name in parameters:
        close(found[name], torch.stack([grad(loss)(parameters, one)[name] for one in x]))


@of_each_class
def test_compiles_into_one_graph_and_exports(kind):
    module, x = make(kind, num_layers=2, bidirectional=True), torch.randn(T, B, I, dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(x), module(x), strict=True):
        close(found, expected)
    compiled(x)[0].sum().backward()
    found = [p.grad.clone() for p in module.parameters()]
    for gradient, expected in zip(
        found, torch.autograd.grad(module(x)[0].sum(), list(module.parameters())), strict=True
    ):
        close(gradient, expected)
    exported = torch.export.export(module, (x,)).module()
    close(exported(x)[0], module(x)[0])


@of_each_class
def test_copies_pickles_and_state_dicts_give_the_same_module(kind):
    module, x = make(kind, num_layers=2, bidirectional=True), torch.randn(T, B, I, dtype=torch.float64)
    other = make(kind, num_layers=2, bidirectional=True)
    other.load_state_dict(module.state_dict())
    for copied in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x)[0], module(x)[0])
        assert repr(copied) == repr(module)


@of_each_class
def test_convert_leaves_it_alone_and_to_torch_says_so(kind):
    model = torch.nn.ModuleDict({"scan": make(kind), "gru": fastrnn.GRU(I, H)})
    fastrnn.convert(model)
    name = type(model["scan"]).__name__
    with pytest.warns(UserWarning, match=rf"leaves as they are: scan \(torch.nn has no {name}\)$"):
        fastrnn.to_torch(model)
    assert isinstance(model["scan"], getattr(fastrnn, name))
    assert type(model["gru"]) is torch.nn.GRU


def test_explain_says_which_kernel_runs(monkeypatch):
    x = torch.randn(T, B, I)
    lines = fastrnn.explain(make("MinGRU", torch.float32, num_layers=2), x)
    assert [(line.layer, line.operator) for line in lines] == [(k, "fastrnn::linear_scan") for k in (0, 1)]
    (line,) = fastrnn.explain(make("SRU", torch.bfloat16), x.bfloat16())
    assert line.forward.endswith("in float32")
    monkeypatch.setattr(fastrnn.functional, "_KERNEL_DTYPES", ())
    monkeypatch.setattr(fastrnn.functional, "_warned", set())
    with pytest.warns(fastrnn.FallbackWarning):
        (line,) = fastrnn.explain(make("MinGRU", torch.float32), x)
    assert line.operator is None
    assert "there are no CPU kernels for torch.float32" in line.forward


def test_a_trace_holds_the_operator():
    module, x = make("MinGRU", torch.float32), torch.randn(T, B, I)
    with torch.no_grad():
        traced = torch.jit.trace(module, x)
        assert "fastrnn::linear_scan" in str(traced.inlined_graph)
        torch.testing.assert_close(traced(x), module(x))


def test_repr_says_what_is_not_the_default():
    assert repr(make("MinGRU")) == "MinGRU(3, 5)"
    module = make("QRNN of two steps", num_layers=2, bias=False, bidirectional=True)
    assert repr(module) == "QRNN(3, 5, num_layers=2, bias=False, bidirectional=True, window=2)"


def test_dropout_lies_between_layers_in_training_alone():
    module, x = make("MinGRU", num_layers=2, dropout=0.5), torch.randn(T, B, I, dtype=torch.float64)
    single = make("MinGRU")
    single.load_state_dict({name: t for name, t in module.state_dict().items() if "_l0" in name})
    second = make("MinGRU", input_size=H)
    second.load_state_dict(
        {name.replace("_l1", "_l0"): t for name, t in module.state_dict().items() if "_l1" in name}
    )
    torch.manual_seed(3)
    found = module(x)[0]
    torch.manual_seed(3)
    close(found, second(torch.dropout(single(x)[0], 0.5, True))[0])
    close(module.eval()(x)[0], second(single(x)[0])[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@of_each_class
def test_16_bit_modules_are_near_float64(kind, dtype):
    module, x = make(kind, dtype), torch.randn(50, B, I).to(dtype)
    exact = copy.deepcopy(module).double()
    y, h_n = module(x)
    assert y.dtype is h_n.dtype is dtype
    torch.testing.assert_close(y.double(), exact(x.double())[0], rtol=0, atol=3e-2)


def test_gates_that_underflow_do_not_divide_zero_by_zero():
    module = make("MinLSTM", torch.float16)
    with torch.no_grad():
        module.weight_ih_l0.zero_()
        module.bias_ih_l0[:] = -20  # sigmoid(-20) is 0 in float16
    y, _ = module(torch.zeros(2, 1, I, dtype=torch.float16))
    torch.testing.assert_close(y, torch.full_like(y, -10).mul_(torch.tensor([1, 1.5]).half()[:, None, None]))


def test_autocast_gives_its_dtype():
    module, x = make("MinGRU", torch.float32), torch.randn(T, B, I)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = module(x, torch.randn(1, B, H))
    assert y.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, "hidden_size must be greater than zero, got 0"),
        ({"hidden_size": 2.0}, TypeError, "hidden_size should be of type int, got: float"),
        ({"num_layers": 0}, ValueError, "num_layers must be greater than zero, got 0"),
        ({"dropout": 1.5}, ValueError, r"dropout should be a number in range \[0, 1\].*got 1.5"),
    ],
)
def test_constructor_refuses_by_name_and_value(options, error, message):
    with pytest.raises(error, match=message):
        fastrnn.MinGRU(**({"input_size": 3, "hidden_size": 5} | options))


def test_window_is_1_or_2():
    with pytest.raises(ValueError, match="window must be 1 or 2, got 3"):
        fastrnn.QRNN(3, 5, window=3)


def test_dropout_of_one_layer_warns():
    with pytest.warns(UserWarning, match="there is one: num_layers=1, dropout=0.5"):
        fastrnn.SRU(3, 5, dropout=0.5)


X = torch.zeros(T, B, I)


@pytest.mark.parametrize(
    ("x", "given", "error", "message"),
    [
        (X[0, 0], {}, ValueError, "MinGRU: Expected input to be 2D or 3D, got 1D instead"),
        (X[:0], {}, RuntimeError, "Expected sequence length to be larger than 0"),
        (X[..., :2], {}, RuntimeError, "Expected 3, got 2"),
        (X, {"hx": torch.zeros(1, H)}, RuntimeError, "batched 3-D input, hx should also be 3-D but got 2-D"),
        (X, {"hx": torch.zeros(2, B, H)}, RuntimeError, r"Expected hidden size \(1, 4, 5\), got \[2, 4, 5\]"),
        (X, {"hx": torch.zeros(1, B, H).double()}, RuntimeError, "Input and hidden tensors are not the same"),
        (X.double(), {}, RuntimeError, "Input and parameter tensors are not the same dtype"),
        (X, {"lengths": [7, 1, 1, 1]}, ValueError, "lengths must be between 0 and T = 6"),
        (X, {"reset": torch.zeros(T, B)}, TypeError, "reset must be bool"),
        (pack_padded_sequence(X, [6, 5, 2, 1]), {"lengths": [1]}, ValueError, "take dense sequences"),
    ],
)  # fmt: skip
def test_call_refuses_bad_input(x, given, error, message):
    with pytest.raises(error, match=message):
        make("MinGRU", torch.float32)(x, **given)
