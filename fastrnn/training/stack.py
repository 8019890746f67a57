"""The recurrent stack of a task: which cell, how large, and from which library it comes."""

import importlib
import inspect
import re
from dataclasses import dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn.training.errors import InputError, check_name, check_number, check_whole, in_short

CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
    "rnn": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
}
BACKENDS = {"fastrnn": "fastrnn", "torch": "torch.nn"}
NORMS: dict[str, Any] = {"none": None, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
DECIDED = {"input_size", "nonlinearity", "batch_first", "device", "dtype"}  # by a task or its trainer


def run_padded(rnn: nn.Module, x: Tensor, lengths: Tensor) -> tuple[Tensor, Any]:
    """Outputs y [T, B, P], zero after each row's end, and the states at the rows' ends.

    Args:
        x: [T, B, I], padded; T is the longest length.
        lengths: [B], each at least 1; on the CPU, or the host waits for them.
    """
    lengths = lengths.cpu()
    if bool((lengths == len(x)).all()):
        return rnn(x)
    if isinstance(rnn, (fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN)):  # 1.3 to 2 times as fast as packing
        return rnn(x, lengths=lengths)
    y, state = rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
    return pad_packed_sequence(y)[0], state


# ---- The options of fastrnn's modules, from their own signatures and docstrings --------------------------


def _entry(docstring: str, name: str) -> str:
    """What a docstring says of an argument, under whatever heading and among whatever names; nothing under
    ``python -OO``, which has no docstrings."""
    found = re.search(rf"^( +)(?:\w+, )*{name}(?:, \w+)*: (.*(?:\n\1 +.*)*)", docstring, re.MULTILINE)
    return " ".join(found[2].split()) if found else ""


def _options() -> dict[str, tuple[Any, str]]:
    """{name: (type, help)} of the keyword-only arguments of fastrnn.LSTM, which has all that GRU and RNN
    have, but those that are fields of a stack."""
    parameters = inspect.signature(fastrnn.LSTM).parameters.values()
    own = {p.name: p.annotation for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    texts = {name: _entry(inspect.getdoc(fastrnn.LSTM) or "", name) for name in own}
    return {"bias": (bool, "whether there are biases.")} | {
        name: (kind, texts[name]) for name, kind in own.items() if name != "forget_bias"
    }


if TYPE_CHECKING:
    Options = dict[str, Any]
else:
    Options = make_dataclass(
        "Options",
        [(name, kind | None, field(default=None)) for name, (kind, _) in _options().items()],
        namespace={"__module__": __name__},
    )
    Options.__doc__ = (
        "Options of fastrnn's modules; those that are left out are the modules' own.\n\nArgs:\n"
        + ("\n".join(f"    {name}: {text}" for name, (_, text) in _options().items()))
    )


# ---- Normalisation between layers --------------------------------------------------------------------------


class NormedLayers(nn.Module):
    """Recurrent layers, of which each but the first gets the output of the one before normalised, then with
    dropout: called as one module of L layers.

    Batch normalisation (Laurent et al. 2016) takes its statistics over all rows and steps that are there:
    what stands after a row's end is never seen. In evaluation it has the running ones.
    """

    def __init__(self, layers: list[nn.Module], norm: str, features: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(NORMS[norm](features) for _ in layers[1:])
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Any, hx: Any = None) -> tuple[Any, Any]:
        """x [T, B, I] or packed, hx as torch.nn's modules take it -> (y, the last states)."""
        states = [None] * len(self.layers) if hx is None else _of_layers(hx, len(self.layers))
        last = []
        for k, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
            if k > 0:
                x = _on_rows(lambda rows, norm=self.norms[k - 1]: self.dropout(norm(rows)), x)
            x, state = layer(x, state)
            last.append(state)
        if isinstance(last[0], tuple):
            return x, tuple(torch.cat(parts) for parts in zip(*last, strict=True))
        return x, torch.cat(last)


def _of_layers(hx: Any, L: int) -> list:
    """The states of each layer [D, B, *], of those of all [L*D, B, *]."""
    if isinstance(hx, tuple):
        return list(zip(*(h.chunk(L) for h in hx), strict=True))
    return list(hx.chunk(L))


def _on_rows(function: Any, x: Any) -> Any:
    """function on the rows [N, features] of a dense or packed sequence."""
    if isinstance(x, PackedSequence):
        return x._replace(data=function(x.data))
    return function(x.flatten(0, 1)).view(x.shape)


# ---- The stack ---------------------------------------------------------------------------------------------


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
        norm: normalisation between layers: none, batch (over all valid steps; Laurent et al., "Batch
            normalized recurrent neural networks", 2016) or layer (over the features of each step).
        options: further keyword arguments of the module, each by its name.

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
    norm: str = "none"
    options: Options = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_whole("stack.hidden_size", self.hidden_size)
        check_whole("stack.num_layers", self.num_layers)
        check_number("stack.dropout", self.dropout, "[0, 1]")
        check_whole("stack.proj_size", self.proj_size, 0, self.hidden_size - 1)
        check_number("stack.forget_bias", self.forget_bias, "(-inf, inf)")
        check_name("stack.norm", self.norm, NORMS)
        if self.norm != "none" and self.num_layers == 1:
            raise InputError(f"stack.norm={self.norm} stands between layers, and stack.num_layers is 1")
        if self.proj_size and self.cell != "lstm":
            raise InputError(f"stack.proj_size is for lstm alone, got {self.proj_size} for {self.cell}")
        given = self.options if isinstance(self.options, dict) else vars(self.options)
        self.options = {name: value for name, value in given.items() if value is not None}
        if taken := sorted((DECIDED | {f.name for f in fields(self)}) & self.options.keys()):
            raise InputError(f"stack.options must not hold {', '.join(taken)}")

    @property
    def output_size(self) -> int:
        """Features of y at one step: P or H, times directions."""
        return (self.proj_size or self.hidden_size) * (2 if self.bidirectional else 1)

    @property
    def sees_the_future(self) -> bool:
        """Whether an output depends on later steps."""
        return self.bidirectional or bool(self.options.get("reverse"))

    def build(self, input_size: int) -> nn.Module:
        """The module, time-major: y [T, B, output_size] from x [T, B, input_size].

        Raises:
            InputError: an unknown name, or the module refuses its options, or it does not fit into memory.
        """
        check_name("stack.cell", self.cell, CELLS)
        check_name("stack.backend", self.backend, BACKENDS)
        dropout = self.dropout if self.num_layers > 1 else 0.0
        try:
            if self.norm == "none":
                rnn: nn.Module = self._module(input_size, self.num_layers, dropout)
            else:
                sizes = [input_size] + [self.output_size] * (self.num_layers - 1)
                layers = [self._module(size, 1, 0.0) for size in sizes]
                rnn = NormedLayers(layers, self.norm, self.output_size, dropout)
        except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: out of memory
            raise InputError(f"the stack cannot be built: {in_short(error)}") from error
        if self.forget_bias and self.cell == "lstm":
            with torch.no_grad():
                for parameter_name, p in rnn.named_parameters():
                    if parameter_name.rpartition(".")[2].startswith("bias_hh"):  # (i) f g o
                        p.view(-1, self.hidden_size)[-3] += self.forget_bias
        return rnn

    def _module(self, input_size: int, num_layers: int, dropout: float) -> nn.Module:
        name, fixed = CELLS[self.cell]
        return getattr(importlib.import_module(BACKENDS[self.backend]), name)(
            input_size,
            self.hidden_size,
            num_layers,
            dropout=dropout,
            bidirectional=self.bidirectional,
            **({"proj_size": self.proj_size} if self.proj_size else {}),
            **fixed,
            **self.options,
        )
