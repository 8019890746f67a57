"""Stateless forms: a *layer* scans a cell over time, a *stack* composes layers and dropout.

``lstm``, ``gru``, ``rnn_tanh`` and ``rnn_relu`` take what ``torch.lstm`` and its siblings take, in the same
order and with the same results; ``*_cell`` likewise. The modules are thin shells around them.
"""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _ops
from .reference import CELLS

__all__ = [
    "gru", "gru_cell", "lstm", "lstm_cell", "rnn_relu", "rnn_relu_cell", "rnn_tanh", "rnn_tanh_cell",
    "set_strict",
]  # fmt: skip

# ---- Which kernel runs, and never a silent substitute ------------------------------------------------

_KERNEL_DTYPES = (torch.float32, torch.float64)
_strict = os.environ.get("FASTRNN_STRICT") == "1"
_warned: set[str] = set()


class FallbackWarning(UserWarning):
    """fastrnn has no kernel for a call and takes torch.nn's own path."""


def set_strict(strict: bool) -> bool:
    """Whether a call without a kernel raises instead of warning; returns the setting before.

    The environment variable ``FASTRNN_STRICT=1`` sets it from the start.
    """
    global _strict
    before, _strict = _strict, strict
    return before


def no_kernel_reason(weight: Tensor) -> str | None:
    """Why a recurrence with this weight takes torch.nn's own path, or None if there is a kernel for it."""
    if weight.device.type not in ("cpu", "meta"):
        return f"this build has no kernels for {weight.device.type} devices"
    if weight.dtype not in _KERNEL_DTYPES:
        return f"there are no CPU kernels for {weight.dtype}"
    return None


def _takes_torch_path(weight: Tensor) -> bool:
    reason = no_kernel_reason(weight)
    if reason is None:
        return False
    if _strict:
        raise RuntimeError(f"fastrnn: {reason}, and strict mode forbids torch.nn's own path")
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"fastrnn: {reason}; torch.nn's own path runs instead", FallbackWarning, stacklevel=4)
    return True


# ---- Checks, in torch.nn's words ---------------------------------------------------------------------


def _check_attributes(input: Tensor, hidden: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    autocast = torch._C._is_any_autocast_enabled()
    for kind, tensors in (("hidden", hidden), ("parameter", params)):
        for t in tensors:
            if t.device != input.device:
                raise RuntimeError(
                    f"Input and {kind} tensors are not at the same device, found input tensor at "
                    f"{input.device} and {kind} tensor at {t.device}"
                )
            if t.dtype != input.dtype and not autocast:
                raise RuntimeError(
                    f"Input and {kind} tensors are not the same dtype, found input tensor with "
                    f"{input.dtype} and {kind} tensor with {t.dtype}"
                )


# ---- Layers and stacks -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """How the rows [N, *] of a sequence are laid out: dense [T, B], dense [B, T] or packed."""

    T: int
    B: int
    batch_first: bool
    batch_sizes: Tensor | None  # packed: int64 [T] on the CPU

    def dense(self, rows: Tensor) -> Tensor:
        """[N, *] -> [T, B, *] or [B, T, *]."""
        shape = (self.B, self.T) if self.batch_first else (self.T, self.B)
        return rows.view(*shape, rows.shape[1])


def layer(
    name: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    params: Sequence[Sequence[Tensor]],
    rows: Rows,
    has_biases: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scans one cell over time: (y [N, D*P], h_n [D, B, P], c_n [D, B, H]).

    x [N, I]; h0 [D, B, P]; c0 [D, B, H] or None; params: for each of the D directions (w_ih [G*H, I],
    w_hh [G*H, P], then b_ih and b_hh [G*H] with biases, then w_hr [P, H] with a projection).
    """
    columns = [list(column) for column in zip(*params, strict=True)]
    biases = columns[2:4] if has_biases else [[], []]
    w_hr = columns[-1] if len(columns) % 2 else []
    weights = _ops.Weights(columns[0], columns[1], *biases, w_hr)
    sequence = _ops.Sequence(rows.batch_first, rows.batch_sizes)
    return _ops.scan(name, x.to(h0.dtype), h0, c0, weights, sequence)[:3]


def _dropout(y: Tensor, p: float, rows: Rows) -> Tensor:
    """torch.dropout on the rows, with the random numbers that torch.nn draws: it works time-major."""
    if rows.batch_sizes is not None or not rows.batch_first:
        return torch.dropout(y, p, True)
    noise = torch.dropout(y.new_ones(rows.T, rows.B, y.shape[1]), p, True)
    return (rows.dense(y) * noise.transpose(0, 1)).flatten(0, 1)


def _stack(
    name: str,
    x: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    rows: Rows,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    keeps_dtype: bool = False,
) -> tuple[Tensor, ...]:
    """Layers one after the other, dropout between them: (y [N, D*P], h_n [L*D, B, P], c_n [L*D, B, H])."""
    D = 2 if bidirectional else 1
    each = len(params) // (num_layers * D)
    output_dtype = None
    if torch.is_autocast_enabled("cpu"):
        # torch's autocast knows lstm and rnn as wholes; of the others it casts the products inside alone.
        output_dtype = hx[0].dtype if keeps_dtype else torch.get_autocast_dtype("cpu")
    dtype = params[1].dtype
    hx = [h.to(dtype) for h in hx]
    finals: list[tuple[Tensor, ...]] = []
    for index in range(num_layers):
        chunk = slice(index * D, (index + 1) * D)
        directions = [params[each * d : each * (d + 1)] for d in range(index * D, (index + 1) * D)]
        c0 = hx[1][chunk] if CELLS[name].has_c else None
        x, *final = layer(name, x, hx[0][chunk], c0, directions, rows, has_biases)
        finals.append(tuple(final))
        if dropout > 0 and train and index < num_layers - 1:
            x = _dropout(x, dropout, rows)
    states = [
        part[0] if num_layers == 1 else torch.cat(part) for part in list(zip(*finals, strict=True))[: len(hx)]
    ]
    result = (x, *states)
    return tuple(t.to(output_dtype) for t in result) if output_dtype is not None else result


def _recurrent(name: str, args: tuple, many_states: bool) -> tuple[Tensor, ...]:
    """torch.lstm and its siblings: dense (input, hx, params, has_biases, num_layers, dropout, train,
    bidirectional, batch_first) or packed (data, batch_sizes, hx, params, has_biases, num_layers, dropout,
    train, bidirectional)."""
    packed = isinstance(args[3], (list, tuple))
    if packed:
        x, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional = args
        batch_first = False
    else:
        x, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first = args
        batch_sizes = None
    hidden = tuple(hx) if many_states else (hx,)
    if _takes_torch_path(params[0]):
        return getattr(torch, name)(*args)
    _check_attributes(x, hidden, params)
    if packed:
        rows = Rows(batch_sizes.shape[0], hidden[0].shape[1], False, batch_sizes)
        flat = x
    else:
        B, T = (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])
        if T == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        rows = Rows(T, B, batch_first, None)
        flat = x.flatten(0, 1)
    y, *states = _stack(
        name,
        flat,
        hidden,
        params,
        rows,
        has_biases,
        num_layers,
        dropout,
        train,
        bidirectional,
        keeps_dtype=name == "gru",
    )
    return (y if packed else rows.dense(y), *states)


def lstm(*args) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.lstm``: (output, h_n, c_n), for dense and for packed arguments."""
    return _recurrent("lstm", args, True)  # type: ignore[return-value]


def gru(*args) -> tuple[Tensor, Tensor]:
    """``torch.gru``: (output, h_n), for dense and for packed arguments."""
    return _recurrent("gru", args, False)  # type: ignore[return-value]


def rnn_tanh(*args) -> tuple[Tensor, Tensor]:
    """``torch.rnn_tanh``: (output, h_n), for dense and for packed arguments."""
    return _recurrent("rnn_tanh", args, False)  # type: ignore[return-value]


def rnn_relu(*args) -> tuple[Tensor, Tensor]:
    """``torch.rnn_relu``: (output, h_n), for dense and for packed arguments."""
    return _recurrent("rnn_relu", args, False)  # type: ignore[return-value]


# ---- One step ----------------------------------------------------------------------------------------


def _check_cell(input: Tensor, hidden: Sequence[Tensor], w_ih: Tensor, w_hh: Tensor) -> None:
    if input.shape[1] != w_ih.shape[1]:
        raise RuntimeError(
            f"input has inconsistent input_size: got {input.shape[1]} expected {w_ih.shape[1]}"
        )
    for i, h in enumerate(hidden):
        if h.dim() != 2:
            raise RuntimeError(f"hidden{i} must be [B, H], got {list(h.shape)}")
        if input.shape[0] != h.shape[0]:
            raise RuntimeError(
                f"Input batch size {input.shape[0]} doesn't match hidden{i} batch size {h.shape[0]}"
            )
        if h.shape[1] != w_hh.shape[1]:
            raise RuntimeError(
                f"hidden{i} has inconsistent hidden_size: got {h.shape[1]}, expected {w_hh.shape[1]}"
            )


def _cell(name: str, input: Tensor, hidden: tuple[Tensor, ...], weights: tuple) -> tuple[Tensor, ...]:
    w_ih, w_hh, b_ih, b_hh = weights
    params = [w for w in weights if w is not None]
    _check_cell(input, hidden, w_ih, w_hh)
    _check_attributes(input, hidden, params)
    rows = Rows(1, input.shape[0], False, None)
    hx = [h.unsqueeze(0) for h in hidden]
    keeps_dtype = name in ("lstm", "gru")
    _, *states = _stack(name, input, hx, params, rows, b_ih is not None, 1, 0.0, False, False, keeps_dtype)
    return tuple(s.squeeze(0) for s in states)


def lstm_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None) -> tuple[Tensor, Tensor]:
    """``torch.lstm_cell``: input [B, I], hx = (h, c) [B, H] -> (h, c)."""
    if _takes_torch_path(w_ih):
        return torch.lstm_cell(input, hx, w_ih, w_hh, b_ih, b_hh)
    return _cell("lstm", input, tuple(hx), (w_ih, w_hh, b_ih, b_hh))  # type: ignore[return-value]


def _single_state_cell(name: str):
    def cell(input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih=None, b_hh=None) -> Tensor:
        if _takes_torch_path(w_ih):
            return getattr(torch, f"{name}_cell")(input, hx, w_ih, w_hh, b_ih, b_hh)
        return _cell(name, input, (hx,), (w_ih, w_hh, b_ih, b_hh))[0]

    cell.__name__ = cell.__qualname__ = f"{name}_cell"
    cell.__doc__ = f"``torch.{name}_cell``: input [B, I], hx [B, H] -> h [B, H]."
    return cell


gru_cell = _single_state_cell("gru")
rnn_tanh_cell = _single_state_cell("rnn_tanh")
rnn_relu_cell = _single_state_cell("rnn_relu")
