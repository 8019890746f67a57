"""explain() says which kernel runs, for every layer, and changes nothing."""

import pytest
import torch
from torch import nn

import fastrnn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = fastrnn.LSTM(4, 40, num_layers=2, bidirectional=True, dropout=0.5)
        self.cell = fastrnn.GRUCell(80, 8)

    def forward(self, x):
        return self.cell(self.rnn(x)[0][-1])


def test_every_layer_is_named_with_its_operator_and_instruction_set():
    found = fastrnn.explain(Model(), torch.randn(5, 64, 4))
    assert [(e.module, e.layer, e.operator) for e in found] == [
        ("rnn", 0, "fastrnn::lstm"),
        ("rnn", 1, "fastrnn::lstm"),
        ("cell", 0, "fastrnn::gru"),
    ]
    assert all(torch.ops.fastrnn.cpu_isa() in e.forward and "thread" in e.backward for e in found)
    assert "rnn layer 1: fastrnn::lstm" in str(found)


@pytest.mark.usefixtures("without_16_bit_kernels")
def test_a_layer_without_a_kernel_is_said_to_take_the_path_of_torch():
    module = fastrnn.GRU(3, 4).to(torch.bfloat16)
    with torch.no_grad():
        (found,) = fastrnn.explain(module, torch.randn(2, 1, 3, dtype=torch.bfloat16))
    assert found.operator is None
    assert "bfloat16" in str(found)


def test_the_module_is_left_as_it_was():
    model = Model().train()
    model.cell.eval()
    state = torch.get_rng_state()
    fastrnn.explain(model, torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(state, torch.get_rng_state())
    assert model.rnn.training
    assert not model.cell.training
    assert not model.rnn._forward_pre_hooks


def test_few_rows_are_shared_out_by_units_and_many_by_rows():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        (few,) = fastrnn.explain(fastrnn.LSTM(512, 512), torch.randn(50, 1, 512))
        (many,) = fastrnn.explain(fastrnn.LSTM(64, 64), torch.randn(50, 64, 64))
    finally:
        torch.set_num_threads(threads)
    assert "2 parts" in few.forward
    assert "2 teams" in many.forward


def test_the_functions_and_packed_sequences_are_explained_too():
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])
    (found,) = fastrnn.explain(fastrnn.RNN(4, 5, nonlinearity="relu"), packed)
    assert found.operator == "fastrnn::rnn_relu"


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.cell = fastrnn.LSTM(4, 40), fastrnn.GRUCell(40, 8)

    def forward(self, x):
        return self.cell(hx=None, input=self.rnn(input=x)[0][-1])


def test_inputs_may_be_given_by_name():
    found = fastrnn.explain(Named(), torch.randn(5, 64, 4))
    assert [(e.module, e.operator) for e in found] == [("rnn", "fastrnn::lstm"), ("cell", "fastrnn::gru")]
    (alone,) = fastrnn.explain(fastrnn.LSTM(4, 40), torch.randn(5, 64, 4))
    assert (found[0].forward, found[0].backward) == (alone.forward, alone.backward)


@pytest.mark.usefixtures("without_16_bit_kernels")
def test_autocast_decides_by_its_dtype(monkeypatch):
    """CUDA's autocast lowers the weights, here to a dtype without a kernel."""
    monkeypatch.setattr(fastrnn.functional, "lowered", lambda tensors: [t.bfloat16() for t in tensors])
    (found,) = fastrnn._explain._explain_module("", fastrnn.GRU(3, 4), torch.randn(2, 1, 3))
    assert found.operator is None
    assert "bfloat16" in found.forward


def test_a_call_with_keywords_and_further_inputs_is_explained():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = fastrnn.GRU(3, 4)

        def forward(self, x, h, scale, lengths=None, reset_to=None):
            reset = torch.zeros(x.shape[:2], dtype=torch.bool)
            return self.rnn(x * scale, h, lengths, reset, reset_to=reset_to)

    x, h = torch.randn(5, 2, 3), torch.zeros(1, 2, 4)
    (found,) = fastrnn.explain(Two(), x, h, 2.0, lengths=[5, 0])
    assert found.operator == "fastrnn::gru"
    (found,) = fastrnn.explain(Two(), x, h, scale=2.0, reset_to=h)
    assert found.operator == "fastrnn::gru"
    (found,) = fastrnn.explain(fastrnn.MinGRU(3, 4), x, lengths=torch.tensor([5, 0]))
    assert found.operator == "fastrnn::linear_scan"
