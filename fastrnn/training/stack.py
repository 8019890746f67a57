"""The recurrent stack of a task: which cell, how large, and from which library it comes."""

import importlib
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastrnn.training.errors import InputError, check_name, check_number, check_whole, in_short

CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
    "rnn": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
}
BACKENDS = {"fastrnn": "fastrnn", "torch": "torch.nn"}
DECIDED = {"input_size", "nonlinearity", "batch_first", "device", "dtype"}  # by a task or its trainer


def run_padded(rnn: nn.RNNBase, x: Tensor, lengths: Tensor) -> tuple[Tensor, Any]:
    """Outputs y [T, B, P], zero after each row's end, and the states at the rows' ends.

    Args:
        x: [T, B, I], padded; T is the longest length.
        lengths: [B], each at least 1.
    """
    lengths = lengths.cpu()
    if bool((lengths == len(x)).all()):
        return rnn(x)
    y, state = rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
    return pad_packed_sequence(y)[0], state


@dataclass
class Stack:
    """Everything that decides a recurrent module, except its input size.

    Args:
        cell: lstm, gru, rnn (tanh) or rnn_relu.
        hidden_size: units H of each layer and direction.
        num_layers: layers L.
        dropout: between layers, in training.
        bidirectional: two directions a layer; the output then has 2 H features.
        proj_size: projection P of an LSTM, 0 for none.
        forget_bias: added to an LSTM's forget gates at the start, so that they begin open (Gers,
            Schmidhuber, Cummins, "Learning to forget", Neural Computation 12, 2000).
        backend: fastrnn or torch: the same module from fastrnn or from torch.nn.
        options: further keyword arguments of the module, such as fastrnn's regularisers.

    Raises:
        InputError: a number out of its range, or an option that is a field above or that the task decides.
    """

    cell: str = "lstm"
    hidden_size: int = 128
    num_layers: int = 1
    dropout: float = 0.0
    bidirectional: bool = False
    proj_size: int = 0
    forget_bias: float = 0.0
    backend: str = "fastrnn"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_whole("stack.hidden_size", self.hidden_size)
        check_whole("stack.num_layers", self.num_layers)
        check_number("stack.dropout", self.dropout, "[0, 1]")
        check_whole("stack.proj_size", self.proj_size, 0, self.hidden_size - 1)
        check_number("stack.forget_bias", self.forget_bias, "(-inf, inf)")
        if self.proj_size and self.cell != "lstm":
            raise InputError(f"stack.proj_size is for lstm alone, got {self.proj_size} for {self.cell}")
        if taken := sorted((DECIDED | {f.name for f in fields(self)}) & self.options.keys()):
            raise InputError(f"stack.options must not hold {', '.join(taken)}")

    @property
    def output_size(self) -> int:
        """Features of y at one step: P or H, times directions."""
        return (self.proj_size or self.hidden_size) * (2 if self.bidirectional else 1)

    def build(self, input_size: int) -> nn.RNNBase:
        """The module, time-major: y [T, B, output_size] from x [T, B, input_size].

        Raises:
            InputError: an unknown name, or the module refuses its options, or it does not fit into memory.
        """
        check_name("stack.cell", self.cell, CELLS)
        check_name("stack.backend", self.backend, BACKENDS)
        name, fixed = CELLS[self.cell]
        module = getattr(importlib.import_module(BACKENDS[self.backend]), name)
        try:
            rnn = module(
                input_size,
                self.hidden_size,
                self.num_layers,
                dropout=self.dropout if self.num_layers > 1 else 0.0,
                bidirectional=self.bidirectional,
                **({"proj_size": self.proj_size} if self.proj_size else {}),
                **fixed,
                **self.options,
            )
        except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: out of memory
            raise InputError(f"the stack cannot be built: {in_short(error)}") from error
        if self.forget_bias and self.cell == "lstm":
            with torch.no_grad():
                for parameter_name, p in rnn.named_parameters():
                    if parameter_name.startswith("bias_hh"):  # (i) f g o
                        p.view(-1, self.hidden_size)[-3] += self.forget_bias
        return rnn
