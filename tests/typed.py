"""The types of the public calls, for mypy (``make lint``); nothing here runs."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import assert_type

import fastrnn
from fastrnn import functional

States = tuple[Tensor, Tensor]


def modules_of_two_states(x: Tensor, packed: PackedSequence, states: States, lengths: Tensor) -> None:
    lstm, cell = fastrnn.LSTM(1, 1), fastrnn.LSTMCell(1, 1)
    assert_type(lstm.forward(x, states, lengths=lengths, return_states=True), tuple[Tensor, States])
    assert_type(lstm.forward(packed, states), tuple[PackedSequence, States])
    assert_type(cell.forward(x, states), States)
    lstm.forward(packed, lengths=lengths)  # type: ignore[call-overload]
    lstm.forward(x, x)  # type: ignore[call-overload]
    assert_type(lstm.forward(x, reset=x, reset_to=states), tuple[Tensor, States])
    lstm.forward(x, reset=x, reset_to=x)  # type: ignore[call-overload]


def modules_of_four_states(x: Tensor, packed: PackedSequence, reset: Tensor) -> None:
    slstm = fastrnn.SLSTM(1, 1, heads=1)
    y, (h, c, n, m) = slstm.forward(x, reset=reset)
    assert_type(y, Tensor)
    slstm.forward(packed, (h, c, n, m))
    slstm.forward(packed, reset=reset)  # type: ignore[call-overload]


def modules_of_one_state(x: Tensor, packed: PackedSequence, h: Tensor, lengths: Sequence[int]) -> None:
    gru, rnn = fastrnn.GRU(1, 1), fastrnn.RNN(1, 1)
    assert_type(gru.forward(x, h, lengths=lengths), tuple[Tensor, Tensor])
    assert_type(gru.forward(packed, h), tuple[PackedSequence, Tensor])
    assert_type(rnn.forward(x, reset=x), tuple[Tensor, Tensor])
    assert_type(rnn.forward(packed), tuple[PackedSequence, Tensor])
    assert_type(fastrnn.GRUCell(1, 1).forward(x, h), Tensor)
    assert_type(fastrnn.RNNCell(1, 1).forward(x), Tensor)
    assert_type(fastrnn.LayerNormGRUCell(1, 1).forward(x, h), Tensor)
    assert_type(fastrnn.LayerNormGRU(1, 1).forward(x, h, reset=x, reset_to=h), tuple[Tensor, Tensor])
    assert_type(gru.forward(x, h, reset=x, reset_to=h), tuple[Tensor, Tensor])
    gru.forward(packed, reset=x)  # type: ignore[call-overload]
    assert_type(fastrnn.MinGRU(1, 1).forward(x, h, lengths=lengths), tuple[Tensor, Tensor])
    assert_type(fastrnn.QRNN(1, 1, window=2).forward(packed), tuple[PackedSequence, Tensor])


def functions(x: Tensor, sizes: Tensor, h: Tensor, states: States, params: list[Tensor]) -> None:
    dense = functional.lstm(x, states, params, True, 1, 0.0, False, False, False, lengths=[1])
    assert_type(dense, tuple[Tensor, Tensor, Tensor])
    packed = functional.lstm(x, sizes, states, params, True, 1, 0.0, False, False)
    assert_type(packed, tuple[Tensor, Tensor, Tensor])
    assert_type(functional.gru(x, h, params, True, 1, 0.0, False, False, True, reset=x), States)
    assert_type(functional.rnn_relu(x, sizes, h, params, True, 1, 0.0, False, False), States)
    assert_type(functional.linear_scan(x, x, h, lengths=[1], reset=x, reverse=True), Tensor)
    assert_type(functional.lstm_cell(x, states, h, h), States)
    assert_type(functional.rnn_tanh_cell(x, h, h, h, None, h), Tensor)
    functional.rnn_tanh(x, sizes, h, params, True, 1, 0.0, False, False, lengths=[1])  # type: ignore[call-overload]
