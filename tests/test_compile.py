"""torch.compile takes fastrnn's layers into its graphs with nothing set, and torch.nn's as torch does."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrizations

import fastrnn

LAYERS = ["LSTM", "GRU", "RNN"]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(4, 2)

    def forward(self, x, **keywords):
        return self.head(self.rnn(x, **keywords)[0])


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_no_length_or_batch_is_compiled_by_itself(kind, dynamic):
    model, count = Model(getattr(fastrnn, kind)(3, 4)), CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=count)
    for T, B in ((5, 2), (6, 2), (7, 3), (500, 4), (9, 5), (2, 7)):
        x = torch.randn(T, B, 3, requires_grad=True)
        y, expected = compiled(x), model(x)
        torch.testing.assert_close(y, expected)
        wanted = [x, *model.parameters()]
        torch.testing.assert_close(
            torch.autograd.grad(y.sum(), wanted), torch.autograd.grad(expected.sum(), wanted)
        )
    assert count.frame_count == (1 if dynamic else 3)  # torch finds out that T changes, then that B does


def test_the_graph_does_not_grow_with_the_length():
    sizes = []
    for T in (5, 500):
        torch._dynamo.reset()
        count = CompileCounter()
        torch.compile(Model(fastrnn.LSTM(3, 4)), fullgraph=True, backend=count)(torch.randn(T, 2, 3))
        sizes.append(count.op_count)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("kind", LAYERS)
def test_what_else_a_layer_takes_is_compiled(kind):
    class Mine(getattr(nn, kind)):
        pass

    x, lengths, reset = torch.randn(5, 2, 3), torch.tensor([5, 0]), torch.rand(5, 2) > 0.5
    for rnn in (
        getattr(fastrnn, kind)(3, 4),
        fastrnn.convert(Mine(3, 4)),
        parametrizations.weight_norm(getattr(fastrnn, kind)(3, 4), "weight_hh_l0"),
    ):
        model = Model(rnn)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for keywords in ({"lengths": lengths}, {"reset": reset}):
            torch.testing.assert_close(compiled(x, **keywords), model(x, **keywords))


@pytest.mark.parametrize("kind", LAYERS)
def test_torch_nns_layers_break_the_graph_as_torch_has_it(kind):
    model = nn.ModuleList([getattr(fastrnn, kind)(3, 3), getattr(nn, kind)(3, 4)])

    def run(x):
        for rnn in model:
            x = rnn(x)[0]
        return x

    x = torch.randn(5, 2, 3)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=rf"RNN, GRU, or LSTM[^$]*{kind}\(3, 4"):
        torch.compile(run, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(torch.compile(run, backend="eager")(x), run(x))
    assert not torch._dynamo.config.allow_rnn


@pytest.mark.parametrize("first", ["fastrnn", "torch._dynamo"])
def test_the_order_of_the_imports_does_not_matter(first):
    script = f"""
import sys
import {first}
import fastrnn, torch
assert ("torch._dynamo" in sys.modules) == ({first!r} == "torch._dynamo")
x = torch.randn(5, 2, 3)
rnn = fastrnn.GRU(3, 4)
torch.testing.assert_close(torch.compile(rnn, fullgraph=True, backend="eager")(x), rnn(x))
"""
    subprocess.run([sys.executable, "-c", script], check=True)
