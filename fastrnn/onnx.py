"""Recurrent layers as ONNX has them: the nodes LSTM, GRU and RNN of https://onnx.ai/onnx/operators.

While ``torch.onnx.export`` records a model, a layer is one operator with the inputs and attributes of its
node. The exporter on ``torch.export`` writes operators of the namespace ``onnx`` as they are, the one on
TorchScript what ``_Recorded.symbolic`` says. They compute what ONNX says they do, so that an exported program
runs and can be verified beside its file.

``X`` [T, B, I]; ``W`` [D, G*H, I], ``R`` [D, G*H, H], ``B`` [D, 2*G*H] and ``P`` [D, 3*H], gates in ONNX's
order.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _operators, functional, reference
from ._autograd import Weights
from ._operators import Keep, Maybe
from .reference import CELLS, SLOTS, W_HR
from .rows import Rows

__all__ = ["decompositions"]

_NODES = {
    "lstm": "LSTM", "lstm_peephole": "LSTM", "lstm_coupled": "LSTM", "gru": "GRU", "rnn_tanh": "RNN",
    "rnn_relu": "RNN", "indrnn_tanh": "RNN", "indrnn_relu": "RNN",
}  # fmt: skip
# Which of fastrnn's blocks stand where ONNX has i o f c, z r h, and i o f of the peepholes.
_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
_PEEPHOLES = (0, 2, 1)

_INPUTS = "Tensor X, Tensor W, Tensor R, Tensor? B, Tensor? sequence_lens, Tensor? initial_h"
_SCHEMAS = {
    "LSTM": f"{_INPUTS}, Tensor? initial_c, Tensor? P, *, str direction, int hidden_size",
    "GRU": f"{_INPUTS}, *, str direction, int hidden_size, int linear_before_reset",
    "RNN": f"{_INPUTS}, *, str[] activations, str direction, int hidden_size",
}
_OPSET = "opset18"  # that of torch's exporter; the nodes are those of opset 14


# ---- The operators -----------------------------------------------------------------------------------


def _reordered(t: Tensor, order: Sequence[int]) -> Tensor:
    """The blocks of t, of equal size, in another order."""
    blocks = t.reshape(len(order), -1)
    return torch.cat([blocks[k] for k in order]).view_as(t)


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _compute(node: str, X, W, R, B, lengths, *initial: Tensor, activations=("Tanh",), **_) -> tuple:
    """What a node gives: Y [T, D, B, H] and the last states [D, B, H]."""
    name, states = {"LSTM": "lstm", "GRU": "gru", "RNN": f"rnn_{activations[0].lower()}"}[node], initial
    P: Maybe = None
    if node == "LSTM":
        *states, P = initial  # type: ignore[assignment]
        name = name if P is None else "lstm_peephole"
    back, weights = _inverse(_GATES[node]), []
    for d in range(len(W)):
        b_ih, b_hh = (None, None) if B is None else (_reordered(b, back) for b in B[d].chunk(2))
        u = None if P is None else _reordered(P[d], _inverse(_PEEPHOLES)).view(3, -1)
        weights += [_reordered(W[d], back), _reordered(R[d], back), b_ih, b_hh, None, u]
    lengths = None if lengths is None else lengths.cpu().long()
    rows, x = Rows(X.shape[0], X.shape[1], lengths=lengths), X.flatten(0, 1)
    if functional.no_kernel_reason(W) is None:
        with torch.no_grad():
            y, last, _ = functional.layer(name, x, states, weights, rows)  # type: ignore[assignment]
    else:
        y, last, _ = reference.forward(CELLS[name], rows, x, states, weights)
    return rows.dense(y).unflatten(2, (len(W), -1)).transpose(1, 2).contiguous(), *last


def _shapes(node: str, X, W, R, B, lengths, *initial: Tensor, **_) -> tuple:
    """Zeros for what ``_compute`` gives."""
    states = initial[: 2 if node == "LSTM" else 1]
    Y = X.new_zeros(X.shape[0], W.shape[0], X.shape[1], R.shape[2])
    return Y, *(torch.zeros_like(h, memory_format=torch.contiguous_format) for h in states)


def _register(node: str) -> torch._ops.OpOverload:
    name, outputs = f"onnx::{node}.{_OPSET}", 3 if node == "LSTM" else 2
    torch.library.define(name, f"({_SCHEMAS[node]}) -> ({', '.join(['Tensor'] * outputs)})")
    for device in ("cpu", "cuda"):
        torch.library.impl(name, device)(partial(_compute, node))
    torch.library.register_fake(name)(partial(_shapes, node))
    return getattr(getattr(torch.ops.onnx, node), _OPSET)


_OPERATORS = {node: _register(node) for node in _SCHEMAS}


class _Recorded(torch.autograd.Function):
    """A node for the exporter on TorchScript."""

    @staticmethod
    def forward(ctx: Any, node, attributes, *inputs):
        return _shapes(node, *inputs, **attributes)

    @staticmethod
    def symbolic(g, node, attributes, *inputs):
        nothing = g.op("prim::Constant")
        nothing.setType(torch.OptionalType.ofTensor())
        typed = {f"{name}_{'i' if isinstance(v, int) else 's'}": v for name, v in attributes.items()}
        given = [nothing if t is None else t for t in inputs]
        H = inputs[2].type().sizes()[2]  # in a trace, sizes of tensors are tensors
        return g.op(node, *given, **typed, hidden_size_i=H, outputs=3 if node == "LSTM" else 2)


# ---- What the layers call ----------------------------------------------------------------------------


torch.library.define("fastrnn::return_states_of_an_LSTM", "(Tensor like, SymInt[] size) -> Tensor")
torch.library.register_fake("fastrnn::return_states_of_an_LSTM")(lambda like, size: like.new_empty(size))


def _decomposed(cell, x, states, weights, slots, packed, batch_sizes, lengths, reset, batch_first, keep):
    """The operator ``fastrnn::scan`` as a node. In place of the history of c and the numbers for the way back
    stand operators that no exporter knows: most programs use neither, and lose them."""
    every: list[Maybe] = []
    given = iter(weights)
    for _ in range(states[0].shape[0]):
        every += [next(given) if slots >> slot & 1 else None for slot in range(SLOTS)]
    rows = Rows.of(x.shape[0], states[0].shape[1], batch_first, batch_sizes, lengths, reset)
    y, last, _ = layer(cell, x, states, every, rows, keep == Keep.HISTORY, as_operator=True)
    D, N, H, saved = len(states[0]), x.shape[0], states[-1].shape[2], CELLS[cell].saved
    unknown = torch.ops.fastrnn.return_states_of_an_LSTM
    return (
        y,
        list(last),
        [unknown(y, (D, N, H)) for _ in states[1:] if keep != Keep.NOTHING],
        [unknown(y, (D, N, saved * H))] if keep == Keep.FOR_BACKWARD and saved else [],
    )


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """For ``torch.onnx.export`` of a program of ``torch.export``, in which layers are fastrnn's operators: a
    table for its ``run_decompositions``. Models need none.

    Raises RuntimeError, from ``run_decompositions``, for what ONNX's nodes have not.

    Example:
        >>> import fastrnn.onnx, torch
        >>> program = torch.export.export(fastrnn.GRU(8, 16), (torch.randn(20, 3, 8),))
        >>> program = program.run_decompositions(fastrnn.onnx.decompositions())
        >>> torch.ops.onnx.GRU.opset18 in [node.target for node in program.graph.nodes]
        True
    """
    return {_operators.scan: _decomposed}


def layer(
    name: str,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Weights,
    rows: Rows,
    keep_history: bool,
    as_operator: bool,
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """``functional.layer`` as a node: an operator, or what the exporter on TorchScript takes."""
    if name not in _NODES:
        functional.refuse_onnx({"slstm": "SLSTM", "lstm_layer_norm": "layer_norm"}[name])
    for is_there, what in (
        (rows.batch_sizes is not None, functional.PACKED),
        (rows.reset is not None, "reset"),
        (weights[W_HR] is not None, "proj_size"),
        (keep_history and len(states) > 1, "return_states of an LSTM"),
    ):
        if is_there:
            functional.refuse_onnx(what)
    node, D = _NODES[name], len(weights) // SLOTS
    each = [_of_node(name, *weights[d : d + SLOTS]) for d in range(0, len(weights), SLOTS)]
    W, R, B, P = (None if parts[0] is None else torch.stack(parts) for parts in zip(*each, strict=True))
    steps = rows.dense(x)
    lengths = None if rows.lengths is None else rows.lengths.to(x.device, torch.int32)
    inputs = [steps.transpose(0, 1) if rows.batch_first else steps, W, R, B, lengths, *states]
    attributes: dict[str, Any] = {"direction": "bidirectional" if D == 2 else "forward"}
    if node == "LSTM":
        inputs.append(P)
    elif node == "GRU":
        attributes["linear_before_reset"] = 1
    else:
        attributes["activations"] = [name.rpartition("_")[2].capitalize()] * D
    if as_operator:
        Y, *last = _OPERATORS[node](*inputs, hidden_size=R.shape[2], **attributes)  # type: ignore[union-attr]
    else:
        Y, *last = _Recorded.apply(node, attributes, *inputs)
    if lengths is not None:  # onnxruntime has zeros for rows without steps
        happens = (lengths > 0).view(-1, 1)
        last = [torch.where(happens, new, old) for new, old in zip(last, states, strict=True)]
    Y = Y.permute(2, 0, 1, 3) if rows.batch_first else Y.transpose(1, 2)  # [B, T, D, H] or [T, B, D, H]
    return Y.flatten(2).flatten(0, 1), last, ()


def _of_node(name: str, w_ih, w_hh, b_ih, b_hh, w_hr, u) -> tuple[Tensor, Tensor, Maybe, Maybe]:
    """W, R, B and P of one direction from its slots of weights."""
    node, P = _NODES[name], None
    order = _GATES[node]
    if not CELLS[name].dense:
        w_hh = u * torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
    elif u is not None:
        P = _reordered(u, _PEEPHOLES).flatten()
    B = None
    if b_ih is not None:
        biases = b_ih, torch.zeros_like(b_ih) if b_hh is None else b_hh
        B = torch.cat([_gates(name, b, order) for b in biases])
    return _gates(name, w_ih, order), _gates(name, w_hh, order), B, P


def _gates(name: str, t: Tensor, order: Sequence[int]) -> Tensor:
    """The gates of t [G*H, *] as a node has them."""
    if name == "lstm_coupled":  # i = 1 - f = sigmoid(-f's argument)
        t = torch.cat((-t[: t.shape[0] // 3], t))
    return _reordered(t, order)
