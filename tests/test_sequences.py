"""lengths=, reset= and return_states= of the modules, against packed sequences and runs cut by hand."""

import warnings

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn

KINDS = ["LSTM", "GRU", "RNN"]
T, B, I, H = 6, 4, 5, 7
LENGTHS = torch.tensor([3, 6, 1, 5])


class Results(TorchDispatchMode):
    """What the fastrnn operators return."""

    def __init__(self):
        super().__init__()
        self.all = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if func.namespace == "fastrnn":
            self.all.append(results)
        return results


def build(kind, batch_first, **options):
    torch.manual_seed(0)
    return getattr(fastrnn, kind)(I, H, num_layers=2, batch_first=batch_first, **options).double()


def sample(batch_first):
    x = torch.randn(B, T, I, dtype=torch.float64)
    return (x if batch_first else x.transpose(0, 1)).contiguous().requires_grad_()


def steps(x, batch_first, chosen):
    return x[:, chosen] if batch_first else x[chosen]


def states(s):
    return s if isinstance(s, tuple) else (s,)


def gradients(outputs, module, x):
    generator = torch.Generator().manual_seed(1)
    loss = sum((o * torch.randn(o.shape, generator=generator, dtype=o.dtype)).sum() for o in outputs)
    return torch.autograd.grad(loss, [x, *module.parameters()])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_lengths_equal_a_packed_sequence_with_all_gradients(kind, batch_first):
    module = build(kind, batch_first, bidirectional=True, **({"proj_size": 3} if kind == "LSTM" else {}))
    x = sample(batch_first)
    y, s = module(x, lengths=LENGTHS)
    packed = pack_padded_sequence(x, LENGTHS, batch_first=batch_first, enforce_sorted=False)
    packed_y, packed_s = module(packed)
    padded, _ = pad_packed_sequence(packed_y, batch_first=batch_first)
    torch.testing.assert_close((y, *states(s)), (padded, *states(packed_s)))
    torch.testing.assert_close(
        gradients((y, *states(s)), module, x), gradients((padded, *states(packed_s)), module, x)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_length_zero_gives_zeros_and_its_initial_state(kind):
    module, x = build(kind, False, bidirectional=True), sample(False)
    h0 = torch.randn(4, B, H, dtype=torch.float64)
    hx = (h0, h0.clone()) if kind == "LSTM" else h0
    y, s = module(x, hx, lengths=[0, 6, 0, 2])
    assert not y[:, [0, 2]].any()
    torch.testing.assert_close(states(s)[0][:, [0, 2]], h0[:, [0, 2]])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_starts_afresh_and_cuts_the_gradient(kind, batch_first):
    module, x = build(kind, batch_first), sample(batch_first)
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[:, 3] = True
    y, s = module(x, reset=reset if batch_first else reset.T)
    first, _ = module(steps(x, batch_first, slice(0, 3)))
    second, last = module(steps(x, batch_first, slice(3, None)))
    expected = torch.cat((first, second), 1 if batch_first else 0)
    torch.testing.assert_close((y, *states(s)), (expected, *states(last)))
    torch.testing.assert_close(
        gradients((y, *states(s)), module, x), gradients((expected, *states(last)), module, x)
    )


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_state_continues_the_sequence_and_is_differentiable(kind, batch_first):
    module, x = build(kind, batch_first), sample(batch_first)
    y, s = module(x)
    with torch.no_grad():
        y_inference, every_inference = module(x, return_states=True)
    y_states, every = module(x, return_states=True)
    torch.testing.assert_close(y_states, y)
    torch.testing.assert_close(y_inference, y)
    torch.testing.assert_close(every_inference, every)
    torch.testing.assert_close(tuple(e[-1] for e in states(every)), states(s))
    middle = tuple(e[2] for e in states(every))
    hx = middle if kind == "LSTM" else middle[0]
    rest, _ = module(steps(x, batch_first, slice(3, None)), hx)
    torch.testing.assert_close(rest, steps(y, batch_first, slice(3, None)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prepacked", [False, True])
def test_states_without_gradients_save_no_gates(kind, prepacked):
    module, x = getattr(fastrnn, kind)(3, 5, bidirectional=True).eval(), torch.randn(4, 2, 3)
    module = fastrnn.prepack(module) if prepacked else module
    with torch.no_grad(), Results() as seen:
        module(x, return_states=True)
    ((_, _, history, saved),) = seen.all
    assert saved == []
    assert [tuple(t.shape) for t in history] == [(2, 8, 5)] * (kind == "LSTM")


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_state_in_the_middle_is_that_of_a_shorter_sequence(kind):
    module, x = build(kind, False), sample(False)
    _, every = module(x, return_states=True)
    _, s = module(x[:3])
    torch.testing.assert_close(
        gradients([e[2] for e in states(every)], module, x), gradients(states(s), module, x)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("without_16_bit_kernels")
def test_options_without_a_kernel_are_composed_and_said_so(kind):
    module, x = build(kind, False), sample(False).detach()
    reset = torch.rand(T, B) < 0.3
    expected, _ = module(x, lengths=LENGTHS, reset=reset)
    fastrnn.functional._warned.clear()
    with pytest.warns(fastrnn.FallbackWarning):
        y, _ = module.bfloat16()(x.bfloat16(), lengths=LENGTHS, reset=reset)
    torch.testing.assert_close(y.double(), expected, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_unbatched_input_takes_them_all(kind):
    module = build(kind, True)
    x = torch.randn(T, I, dtype=torch.float64)
    y, every = module(x, lengths=4, reset=torch.zeros(T, dtype=torch.bool), return_states=True)
    assert y.shape == (T, H)
    assert all(e.shape == (T, 2, H) for e in states(every))
    assert not y[4:].any()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lengths": [1, 2, 3]}, ValueError, r"lengths must be \[B\] = \[4\], got \[3\]"),
        ({"lengths": [1, 2, 3, -1]}, ValueError, "between 0 and T = 6"),
        ({"lengths": [1, 2, 3, 7]}, ValueError, "between 0 and T = 6"),
        ({"lengths": [1.0, 2.0, 3.0, 4.0]}, TypeError, "lengths must be integers"),
        ({"reset": torch.zeros(T, B)}, TypeError, "reset must be bool"),
        ({"reset": torch.zeros(B, T, dtype=torch.bool)}, ValueError, r"reset must be \[T, B\] = \[6, 4\]"),
    ],
)
def test_bad_options_are_named_with_both_values(options, error, words):
    module, x = build("GRU", False), sample(False)
    with pytest.raises(error, match=words):
        module(x, **options)


def test_a_packed_sequence_has_its_lengths_already():
    module = build("GRU", False)
    packed = pack_padded_sequence(sample(False), LENGTHS, enforce_sorted=False)
    with pytest.raises(ValueError, match="dense sequences"):
        module(packed, lengths=LENGTHS)


def test_nothing_warns_on_the_ordinary_path():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build("LSTM", False)(sample(False), lengths=LENGTHS)
