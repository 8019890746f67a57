"""Stateless forms: a *layer* scans a cell over time, a *stack* composes layers and dropout.

``lstm``, ``gru``, ``rnn_tanh`` and ``rnn_relu`` take what ``torch.lstm`` and its siblings take, in the same
order and with the same results; ``*_cell`` likewise. The modules are thin shells around them.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import _cuda, _ops, reference
from ._warn import warn
from .reference import CELLS

__all__ = [
    "StateGradients", "gru", "gru_cell", "lstm", "lstm_cell", "lstm_peephole", "lstm_peephole_cell",
    "rnn_relu", "rnn_relu_cell", "rnn_tanh", "rnn_tanh_cell", "set_strict",
]  # fmt: skip

# ---- Which kernel runs, and never a silent substitute ------------------------------------------------

_KERNEL_DTYPES = (torch.float32, torch.float64)
_strict = os.environ.get("FASTRNN_STRICT") == "1"
_warned: set[str] = set()


class FallbackWarning(UserWarning):
    """fastrnn has no kernel for a call and takes torch.nn's own path, or one of torch operations where
    torch.nn has none."""


def set_strict(strict: bool) -> bool:
    """Whether a call without a kernel raises instead of warning; returns the setting before.

    The environment variable ``FASTRNN_STRICT=1`` sets it from the start.
    """
    global _strict
    before, _strict = _strict, strict
    return before


def no_kernel_reason(weight: Tensor) -> str | None:
    """Why a recurrence with this weight takes torch.nn's own path, or None if there is a kernel for it."""
    if weight.is_cuda:
        return _cuda.no_kernel_reason(weight)
    if not (weight.is_cpu or weight.is_meta):
        return f"there are no kernels for {weight.device.type} devices"
    if weight.dtype not in _KERNEL_DTYPES:
        return f"there are no CPU kernels for {weight.dtype}"
    return None


def is_recorded() -> bool:
    """Whether torch.jit.trace or torch.onnx.export records this call."""
    if torch.compiler.is_compiling():
        return torch.onnx.is_in_onnx_export()
    return torch._C._is_tracing()  # torch.jit.is_tracing() adds two calls, in each short call three times


def torch_path_reason(weight: Tensor, extended: bool = False) -> str | None:
    """Why this very call takes torch.nn's own path, or None: as no_kernel_reason, and while it is recorded,
    unless it has options that torch.nn has not (``extended``): a trace holds fastrnn's operators for them."""
    reason = no_kernel_reason(weight)
    if reason is None and is_recorded():
        if not extended:
            return "torch.jit.trace and torch.onnx.export record torch's own operators"
        if torch.onnx.is_in_onnx_export():
            raise RuntimeError(
                "fastrnn: torch.onnx.export takes what torch.nn has, "
                "not lengths, reset, return_states or peephole"
            )
    return reason


def takes_torch_path(weight: Tensor, extended: bool = False) -> bool:
    """Whether this call takes torch.nn's own path, or one of torch operations where torch.nn has none
    (``extended``), which is said once, or refused in strict mode."""
    reason = torch_path_reason(weight, extended)
    if reason is None:
        return False
    path = "a path of torch operations" if extended else "torch.nn's own path"
    if _strict:
        raise RuntimeError(f"fastrnn: {reason}, and strict mode forbids {path}")
    if reason not in _warned:
        _warned.add(reason)
        warn(f"{reason}; {path} runs instead", FallbackWarning)
    return True


# ---- Checks, in torch.nn's words ---------------------------------------------------------------------


def _check_attributes(input: Tensor, hidden: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    device, dtype = input.device, input.dtype
    for t in (*hidden, *params):
        if t.dtype is not dtype or t.device != device:
            break
    else:
        return
    # Autocast brings tensors to one dtype, but for float64, which it leaves as it is; on meta nothing is
    # multiplied, and torch takes any dtypes.
    autocast = torch._C._is_any_autocast_enabled()
    for kind, tensors in (("hidden", hidden), ("parameter", params)):
        for t in tensors:
            if t.device != device:
                raise RuntimeError(
                    f"Input and {kind} tensors are not at the same device, found input tensor at "
                    f"{device} and {kind} tensor at {t.device}"
                )
            castable = autocast and (input.is_meta or torch.float64 not in (t.dtype, dtype))
            if t.dtype != dtype and not castable:
                raise RuntimeError(
                    f"Input and {kind} tensors are not the same dtype, found input tensor with "
                    f"{dtype} and {kind} tensor with {t.dtype}"
                )


# ---- Layers and stacks -------------------------------------------------------------------------------


class Rows(NamedTuple):
    """How the rows [N, *] of a sequence are laid out, [T, B], [B, T] or packed, and which count."""

    T: int
    B: int
    batch_first: bool = False
    batch_sizes: Tensor | None = None  # packed: int64 [T] on the CPU
    lengths: Tensor | None = None  # dense: int64 [B] on the CPU
    reset: Tensor | None = None  # bool [N]

    def dense(self, rows: Tensor) -> Tensor:
        """[N, *] -> [T, B, *] or [B, T, *]."""
        shape = (self.B, self.T) if self.batch_first else (self.T, self.B)
        return rows.view(*shape, *rows.shape[1:])

    def states(self, rows: Tensor) -> Tensor:
        """[N, D, *] -> [T, D, B, *]: what hx takes, for every step."""
        steps = self.dense(rows)
        return steps.permute(1, 2, 0, 3) if self.batch_first else steps.transpose(1, 2)

    def places(self) -> tuple[Tensor, Tensor]:
        """The step of each row and its batch index (packed: its rank by length), both [N] on the CPU."""
        if self.batch_sizes is not None:
            return _ops.packed_places(self.batch_sizes, int(self.batch_sizes.sum()))
        t, b = torch.meshgrid(
            torch.arange(self.T, device="cpu"), torch.arange(self.B, device="cpu"), indexing="ij"
        )
        return (t.T.flatten(), b.T.flatten()) if self.batch_first else (t.flatten(), b.flatten())

    def ends(self) -> Tensor:
        """The number of steps of each batch index [B], on the CPU."""
        if self.batch_sizes is not None:
            return (self.batch_sizes[:, None] > torch.arange(self.B, device=self.batch_sizes.device)).sum(0)
        return torch.full((self.B,), self.T, device="cpu") if self.lengths is None else self.lengths


@dataclass(frozen=True)
class StateGradients:
    """What back-propagation through one layer found for its states: the complete dL/dh_t and dL/dc_t, that
    is, with all that later steps add."""

    layer: int  # from 0
    rows: Rows
    dh: Tensor  # [D, N, P], zero in rows beyond the lengths
    dc: Tensor | None  # [D, N, H] of an LSTM


StateHook = Callable[[StateGradients], object]


def layer_weights(name: str, columns: Sequence[_ops.Tensors], has_biases: bool) -> _ops.Weights:
    """Of one layer, from what its module keeps of each of its D directions, in torch's order: all w_ih
    [G*H, I], all w_hh [G*H, P], then b_ih and b_hh [G*H] with biases, then w_hr [P, H] with a projection;
    last, vectors of parameters [k*H] of cells that have some."""
    b_ih: _ops.Tensors = ()
    b_hh: _ops.Tensors = ()
    if has_biases:
        w_ih, w_hh, b_ih, b_hh, *rest = columns
    else:
        w_ih, w_hh, *rest = columns
    w_hr = rest.pop(0) if rest and rest[0][0].dim() == 2 else ()
    u = [_joined(name, vectors) for vectors in zip(*rest, strict=True)] if rest else ()
    return _ops.Weights(w_ih, w_hh, b_ih, b_hh, w_hr, u)


def _joined(name: str, vectors: _ops.Tensors) -> Tensor:
    """[U, H], as the kernels take them, of all vectors of a direction. It remembers them for _prepack, which
    goes by the tensors that users hold."""
    u = torch.cat(vectors).view(CELLS[name].vectors, -1)
    if not _ops._is_traced():
        u.joined = vectors  # type: ignore[attr-defined]
    return u


def stack_weights(
    name: str, params: _ops.Tensors, has_biases: bool, num_layers: int, bidirectional: bool
) -> list[_ops.Weights]:
    """Of each layer, from all parameters in torch's order: one direction after the other."""
    of_layer = len(params) // num_layers
    each = of_layer // 2 if bidirectional else of_layer
    return [
        layer_weights(name, [params[k + i : k + of_layer : each] for i in range(each)], has_biases)
        for k in range(0, len(params), of_layer)
    ]


def layer(
    name: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    weights: _ops.Weights,
    rows: Rows,
    all_c: bool = False,
    composed: bool = False,
    listener: Callable[[Tensor, Tensor], object] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scans one cell over time: (y [N, D*P], h_n [D, B, P], c_n [D, B, H], every c [D, N, H] if all_c).

    x [N, I]; h0 [D, B, P]; c0 [D, B, H] or None. ``composed`` makes it from torch operations, for what has
    no kernel. ``listener`` as for ``_ops.scan``.
    """
    sequence = _ops.Sequence(*rows[2:])
    x = _as(h0.dtype, x)
    if composed:
        layout = sequence.layout(x.shape[0], h0.shape[1])
        return reference.forward(CELLS[name], layout, x, h0, c0, *weights)
    return _ops.scan(name, x, h0, c0, weights, sequence, all_c, listener)


def _as(dtype: torch.dtype, t: Tensor) -> Tensor:
    """t.to(dtype), which takes a microsecond to find that there is nothing to do."""
    return t if t.dtype is dtype else t.to(dtype)


def _dropout(y: Tensor, p: float, rows: Rows) -> Tensor:
    """torch.dropout on the rows, with the random numbers that torch.nn draws: it works time-major."""
    if rows.batch_sizes is not None or not rows.batch_first:
        return torch.dropout(y, p, True)
    noise = torch.dropout(y.new_ones(rows.T, rows.B, y.shape[1]), p, True)
    return (rows.dense(y) * noise.transpose(0, 1)).flatten(0, 1)


def lowered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Under CUDA's autocast, in its dtype: torch.nn lowers recurrent layers and cells there as wholes."""
    if not (tensors[0].is_cuda and torch.is_autocast_enabled("cuda")):
        return list(tensors)
    dtype = torch.get_autocast_dtype("cuda")
    return [t if t.dtype is torch.float64 else t.to(dtype) for t in tensors]


_ONEDNN = torch.backends.mkldnn.is_available()
_ONEDNN_BFLOAT16 = _ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()
_ONEDNN_FLOAT16 = _ONEDNN and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def _torch_uses_onednn(x: Tensor) -> bool:
    """Whether torch hands an LSTM without projections over the dense ``x`` on the CPU to oneDNN."""
    if not _ONEDNN or not torch.backends.mkldnn.enabled or x.numel() == 0:
        return False
    if x.dtype is torch.float16:
        return _ONEDNN_FLOAT16 and not torch.is_grad_enabled()
    return x.dtype is torch.float32 or (x.dtype is torch.bfloat16 and _ONEDNN_BFLOAT16)


def _autocast_dtypes(
    name: str, x: Tensor, hidden: Sequence[Tensor], weight: Tensor, projected: bool, dense: bool
) -> tuple[torch.dtype, torch.dtype] | None:
    """The dtypes that torch.nn's h and c have under the CPU's autocast, None outside it. The kernels compute
    in the dtype of the weights.

    Autocast lowers rnn, its cell and oneDNN's LSTM (``dense``) as wholes. Of the others it lowers only the
    products inside, so that the state that is carried along (of an LSTM c) widens the result. It leaves
    float64 as it is, and tensors on other devices."""
    if x.is_cuda or not torch.is_autocast_enabled("cpu"):
        return None
    carried = hidden[-1].dtype
    if not x.is_cpu:
        c = torch.promote_types(weight.dtype, carried)
        return torch.promote_types(c, x.dtype) if name == "gru" else c, c
    if x.dtype is torch.float64:
        return x.dtype, x.dtype
    lowered = torch.get_autocast_dtype("cpu")
    if name.startswith("rnn") or (name == "lstm" and dense and not projected and _torch_uses_onednn(x)):
        return lowered, lowered
    c = torch.promote_types(lowered, carried)
    return lowered if projected else c, c


def _autocast_results(
    dtypes: tuple[torch.dtype, torch.dtype] | None, h: Sequence[Tensor], c: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    if dtypes is None:
        return (*h, *c)
    return (*(t.to(dtypes[0]) for t in h), *(t.to(dtypes[1]) for t in c))


def _stack(
    name: str,
    x: Tensor,
    hx: Sequence[Tensor],
    params: _ops.Tensors,
    rows: Rows,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    *,
    return_states: bool,
    composed: bool,
    state_hook: StateHook | None,
) -> tuple[Tensor, ...]:
    """Layers one after the other, dropout between them: y [N, D*P] and h_n [L*D, B, P], c_n [L*D, B, H], or
    all states, h [T, L*D, B, P] and c [T, L*D, B, H]."""
    D = 2 if bidirectional else 1
    dtype = params[1].dtype
    hx = [_as(dtype, h) for h in hx]
    results: list[tuple[Tensor, ...]] = []
    for index, weights in enumerate(stack_weights(name, params, has_biases, num_layers, bidirectional)):
        h0, *c0 = hx if num_layers == 1 else [h[index * D : (index + 1) * D] for h in hx]
        listener = None if state_hook is None else partial(_tell, state_hook, index, rows)
        x, h, c, all_c = layer(
            name, x, h0, c0[0] if c0 else None, weights, rows, return_states, composed, listener
        )
        if return_states:
            h = rows.states(x.unflatten(1, (D, -1)))
            c = rows.states(all_c.transpose(0, 1)) if c0 else c
        results.append((h, c)[: len(hx)])
        if dropout > 0 and train and index < num_layers - 1:
            x = _dropout(x, dropout, rows)
    if num_layers == 1:
        return x, *results[0]
    dim = 1 if return_states else 0
    return x, *(torch.cat(part, dim) for part in zip(*results, strict=True))


def _tell(hook: StateHook, layer: int, rows: Rows, dh: Tensor, dc: Tensor) -> None:
    hook(StateGradients(layer, rows, dh, dc if dc.dim() == 3 else None))


def as_lengths(lengths: Tensor | Sequence[int]) -> Tensor:
    """As a tensor; numbers become one on the CPU, whatever the default device is."""
    return lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths, device="cpu")


def _has_numbers(t: Tensor) -> bool:
    """Whether one may ask for them: not of a tensor that stands for others, nor of one without numbers."""
    stands_for_others = _ops._is_traced() or torch.jit.is_tracing() or isinstance(t, FakeTensor)
    return not (stands_for_others or t.is_meta)


def _lengths(lengths: Tensor | Sequence[int], T: int, B: int) -> Tensor:
    lengths = as_lengths(lengths)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if tuple(lengths.shape) != (B,):
        raise ValueError(f"lengths must be [B] = [{B}], got {list(lengths.shape)}")
    lengths = lengths.to("meta" if lengths.is_meta else "cpu", torch.int64)
    if B > 0 and _has_numbers(lengths) and (lengths.min() < 0 or lengths.max() > T):
        raise ValueError(f"lengths must be between 0 and T = {T}, got {lengths.tolist()}")
    return lengths


def _reset(reset: Tensor, T: int, B: int, batch_first: bool) -> Tensor:
    if reset.dtype != torch.bool:
        raise TypeError(f"reset must be bool, got {reset.dtype}")
    letters, shape = ("[B, T]", (B, T)) if batch_first else ("[T, B]", (T, B))
    if tuple(reset.shape) != shape:
        raise ValueError(f"reset must be {letters} = {list(shape)}, got {list(reset.shape)}")
    return reset.flatten()


def _recurrent(
    name: str, args: tuple, lengths, reset, return_states: bool, state_hook: StateHook | None
) -> tuple[Tensor, ...]:
    """torch.lstm and its siblings: dense (input, hx, params, has_biases, num_layers, dropout, train,
    bidirectional, batch_first) or packed (data, batch_sizes, hx, params, has_biases, num_layers, dropout,
    train, bidirectional)."""
    packed = isinstance(args[3], (list, tuple))
    extended = lengths is not None or reset is not None or return_states
    if packed:
        x, batch_sizes, hx, params, *options = args
        if extended:
            raise ValueError("lengths, reset and return_states take dense sequences, not packed ones")
    else:
        x, hx, params, *options, batch_first = args
    cell = CELLS[name]
    hidden = tuple(hx) if cell.has_c else (hx,)
    extended = extended or cell.vectors > 0  # torch has no such cell
    torch_path = takes_torch_path(params[0], extended)
    if state_hook is not None and (torch_path or _ops._is_traced()):
        reason = torch_path_reason(params[0], extended)
        raise RuntimeError(
            "the gradients of the states come from the kernels in ordinary calls: "
            + (reason or "there are none in torch.compile, torch.export and torch.func")
        )
    if torch_path and not extended:
        return getattr(torch, name)(*args)
    _check_attributes(x, hidden, params)
    params = lowered(params)
    if packed:
        rows = Rows(batch_sizes.shape[0], hidden[0].shape[1], batch_sizes=batch_sizes)
        flat = x
    else:
        B, T = (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])
        if T == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        rows = Rows(
            T,
            B,
            batch_first,
            lengths=None if lengths is None else _lengths(lengths, T, B),
            reset=None if reset is None else _reset(reset, T, B, batch_first),
        )
        flat = x.flatten(0, 1)
    projected = len(hidden) == 2 and hidden[0].shape[2] != hidden[1].shape[2]
    dtypes = _autocast_dtypes(name, x, hidden, params[0], projected, dense=not packed)
    y, h, *c = _stack(
        name, flat, hidden, params, rows, *options,
        return_states=return_states, composed=torch_path, state_hook=state_hook,
    )  # fmt: skip
    return _autocast_results(dtypes, (y if packed else rows.dense(y), h), c)


def lstm(
    *args, lengths=None, reset=None, return_states: bool = False, state_hook: StateHook | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.lstm``: (output, h_n, c_n), for dense and for packed arguments.

    Dense ones also take ``lengths`` (integers [B], any order, zeros allowed: output is zero beyond, h_n and
    c_n are the states at each length), ``reset`` (bool [T, B], [B, T] with batch_first: the state is zeroed
    before that step) and ``return_states``: (output, h [T, L*D, B, P], c [T, L*D, B, H]), every state.
    ``state_hook`` is called with the ``StateGradients`` of each layer whenever back-propagation passes it.
    """
    return _recurrent("lstm", args, lengths, reset, return_states, state_hook)  # type: ignore[return-value]


def lstm_peephole(
    *args, lengths=None, reset=None, return_states: bool = False, state_hook: StateHook | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``lstm`` with peepholes: after the parameters of a direction that ``torch.lstm`` takes come its
    weight_ci, weight_cf and weight_co [H]."""
    return _recurrent("lstm_peephole", args, lengths, reset, return_states, state_hook)  # type: ignore[return-value]


def gru(
    *args, lengths=None, reset=None, return_states: bool = False, state_hook: StateHook | None = None
) -> tuple[Tensor, Tensor]:
    """``torch.gru``: (output, h_n), for dense and for packed arguments; keywords as for ``lstm``."""
    return _recurrent("gru", args, lengths, reset, return_states, state_hook)  # type: ignore[return-value]


def rnn_tanh(
    *args, lengths=None, reset=None, return_states: bool = False, state_hook: StateHook | None = None
) -> tuple[Tensor, Tensor]:
    """``torch.rnn_tanh``: (output, h_n), for dense and for packed arguments; keywords as for ``lstm``."""
    return _recurrent("rnn_tanh", args, lengths, reset, return_states, state_hook)  # type: ignore[return-value]


def rnn_relu(
    *args, lengths=None, reset=None, return_states: bool = False, state_hook: StateHook | None = None
) -> tuple[Tensor, Tensor]:
    """``torch.rnn_relu``: (output, h_n), for dense and for packed arguments; keywords as for ``lstm``."""
    return _recurrent("rnn_relu", args, lengths, reset, return_states, state_hook)  # type: ignore[return-value]


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


_ONE_STEP = _ops.Sequence(batch_first=False)


def cell_biases(b_ih: Tensor | None, b_hh: Tensor | None) -> list[Tensor]:
    """Both or none, as the kernels take them: zeros for one that is missing."""
    if b_ih is None:
        return [] if b_hh is None else [torch.zeros_like(b_hh), b_hh]
    return [b_ih, torch.zeros_like(b_ih) if b_hh is None else b_hh]


def _cell(
    name: str, input: Tensor, hx, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    *vectors: Tensor,
):  # fmt: skip
    """``torch.<name>_cell``, and cells with vectors of parameters, which torch has not. Without units (H = 0)
    there is nothing to compute, and no kernel for it."""
    torch_path = w_hh.shape[-1] == 0 or takes_torch_path(w_ih, vectors != ())
    if torch_path and not vectors:
        return getattr(torch, f"{name}_cell")(input, hx, w_ih, w_hh, b_ih, b_hh)
    hidden = tuple(hx) if CELLS[name].has_c else (hx,)
    biases = cell_biases(b_ih, b_hh)
    _check_cell(input, hidden, w_ih, w_hh)
    _check_attributes(input, hidden, (w_ih, w_hh, *biases, *vectors))
    w_ih, w_hh, *others = lowered((w_ih, w_hh, *biases, *vectors))
    input, *hidden = lowered((input, *hidden))  # type: ignore[assignment]
    dtypes = _autocast_dtypes(name, input, hidden, w_hh, projected=False, dense=False)
    if dtypes is not None:
        input, *hidden = (t.to(w_hh.dtype) for t in (input, *hidden))  # type: ignore[assignment]
    c0 = hidden[1].unsqueeze(0) if CELLS[name].has_c else None
    one_layer = layer_weights(name, [[w] for w in (w_ih, w_hh, *others)], len(biases) > 0)
    h0 = hidden[0].unsqueeze(0)
    if torch_path:
        layout = _ONE_STEP.layout(len(input), len(input))
        h, _, c, _ = reference.forward(CELLS[name], layout, input, h0, c0, *one_layer)
    else:
        h, _, c, _ = _ops.scan(name, input, h0, c0, one_layer, _ONE_STEP)
    results = _autocast_results(dtypes, (h,), () if c0 is None else (c.squeeze(0),))
    return results if CELLS[name].has_c else results[0]


def lstm_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None) -> tuple[Tensor, Tensor]:
    """``torch.lstm_cell``: input [B, I], hx = (h, c) [B, H] -> (h, c)."""
    return _cell("lstm", input, hx, w_ih, w_hh, b_ih, b_hh)


def lstm_peephole_cell(input, hx, w_ih, w_hh, b_ih, b_hh, w_ci, w_cf, w_co) -> tuple[Tensor, Tensor]:
    """``lstm_cell`` with peepholes w_ci, w_cf and w_co [H]; both biases may be None."""
    return _cell("lstm_peephole", input, hx, w_ih, w_hh, b_ih, b_hh, w_ci, w_cf, w_co)


def _single_state_cell(name: str):
    def cell(input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih=None, b_hh=None) -> Tensor:
        return _cell(name, input, hx, w_ih, w_hh, b_ih, b_hh)

    cell.__name__ = cell.__qualname__ = f"{name}_cell"
    cell.__doc__ = f"``torch.{name}_cell``: input [B, I], hx [B, H] -> h [B, H]."
    return cell


gru_cell = _single_state_cell("gru")
rnn_tanh_cell = _single_state_cell("rnn_tanh")
rnn_relu_cell = _single_state_cell("rnn_relu")
