"""Stateless forms: a *layer* scans a cell over time, a *stack* composes layers and dropout.

``lstm``, ``gru``, ``rnn_tanh`` and ``rnn_relu`` take what ``torch.lstm`` and its siblings take, in the same
order and with the same results; ``*_cell`` likewise. The modules are thin shells around them.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import _autograd, _cuda, _linear, _prepack, _recompute, reference, step_options
from ._warn import warn
from .reference import CELLS, SLOTS, W_HH, W_HR, W_IH, U
from .rows import Rows
from .step_options import NO_OPTIONS, StepOptions

__all__ = [
    "StateGradients", "gru", "gru_cell", "gru_layer_norm", "gru_layer_norm_cell", "linear_scan", "lstm",
    "lstm_cell", "lstm_coupled", "lstm_coupled_cell", "lstm_layer_norm", "lstm_layer_norm_cell",
    "lstm_peephole", "lstm_peephole_cell", "rnn_relu", "rnn_relu_cell", "rnn_tanh", "rnn_tanh_cell",
    "set_strict", "slstm",
]  # fmt: skip

# ---- Which kernel runs, and never a silent substitute ------------------------------------------------

_KERNEL_DTYPES = (torch.float32, torch.float64)
SUMMED_IN_FLOAT32 = (torch.float16, torch.bfloat16)  # what the CPU's kernels take besides
_TORCHS = {"lstm", "gru", "rnn_tanh", "rnn_relu"}  # cells that torch has
_strict = os.environ.get("FASTRNN_STRICT") == "1"
_warned: set[str] = set()
_NOTHING: Mapping[str, Any] = {}


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
    if weight.dtype not in (*_KERNEL_DTYPES, *SUMMED_IN_FLOAT32):
        return f"there are no CPU kernels for {weight.dtype}"
    return None


def _exports_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


# torch.onnx.export traces once more by dynamo what has failed. That takes torch's function for False, and
# calls one that is marked.
_exports_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_recorded() -> bool:
    """Whether torch.jit.trace or torch.onnx.export records this call."""
    if torch.compiler.is_compiling():
        return _exports_onnx()
    return torch._C._is_tracing()  # torch.jit.is_tracing() is two calls more, three times in a forward


_A_NODE = "torch.onnx.export writes a node of ONNX"


def torch_path_reason(weight: Tensor, extended: bool = False) -> str | None:
    """Why this very call takes torch.nn's own path, or None: as no_kernel_reason, and while it is recorded.
    A trace holds fastrnn's operators for options that torch.nn has not (``extended``), and an ONNX file its
    own."""
    if is_recorded():
        if _exports_onnx():
            return _A_NODE
        if not extended:
            return no_kernel_reason(weight) or "torch.jit.trace records torch's own operators"
    return no_kernel_reason(weight)


def becomes_a_node() -> bool:
    """Whether torch.onnx.export records this call."""
    return is_recorded() and _exports_onnx()


def refuse_onnx(what: str) -> None:
    raise RuntimeError(
        f"fastrnn: torch.onnx.export does not take {what}, which ONNX's recurrent nodes have not"
    )


def _refuse_onnx_between_steps(acts: Mapping[str, Any], train: bool, reset_to: Any = None) -> None:
    acting = step_options.acting(acts, train, torch.is_grad_enabled())
    if acting := acting + ["reset_to"] * (reset_to is not None):
        refuse_onnx(" and ".join(acting))


PACKED = "a PackedSequence (lengths= it does)"


def takes_torch_path(weight: Tensor, extended: bool = False) -> bool:
    """Whether this call takes torch.nn's own path, or one of torch operations where torch.nn has none
    (``extended``), which is said once, or refused in strict mode; or becomes a node of ONNX."""
    reason = torch_path_reason(weight, extended)
    if reason is None:
        return False
    if reason is _A_NODE:
        return True
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
    # Autocast casts every dtype but float64 to one. On the meta device torch multiplies nothing, and accepts
    # any dtypes.
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


@dataclass(frozen=True)
class StateGradients:
    """The complete gradients of one layer's states in one back-propagation: dL/dh_t and dL/dc_t, with the
    contributions of all later steps."""

    layer: int  # from 0
    rows: Rows
    dh: Tensor  # [D, N, P], zero in rows beyond the lengths; dh and dc after state_gradient_clip
    dc: Tensor | None  # [D, N, H] of an LSTM


StateHook = Callable[[StateGradients], object]
Lengths = Tensor | Sequence[int]  # [B]
Parameters = list[Tensor] | tuple[Tensor, ...]


def slots(
    name: str, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, *others: Tensor
) -> tuple[Tensor | None, ...]:
    """The weights of one direction as the operators take them. others: w_hr [P, H] with a projection, then
    the vectors of parameters [k*H] of cells that have some. With layer normalisation the first of these is
    gain_ih, which stands in the place of w_hr until ``layer`` has made the gates."""
    cell = CELLS[name]
    if not cell.dense:  # its weight_hh is a vector
        return w_ih, None, b_ih, None, None, _joined(cell, [w_hh])
    if cell.takes_gates and cell.biases == 1:  # x and h are normalised together
        return w_ih, w_hh, b_ih, None, None, _joined(cell, others)
    if cell.takes_gates:
        gain_ih, gain_hh, *rest = others
        u = _joined(cell, [gain_hh, b_hh, *rest])
        return w_ih, w_hh, b_ih, None, gain_ih, u
    if others and others[0].dim() == 2:
        return w_ih, w_hh, b_ih, b_hh, others[0], _joined(cell, others[1:])
    return w_ih, w_hh, b_ih, b_hh, None, _joined(cell, others)


def _joined(cell: reference.Cell, vectors: Sequence[Tensor | None]) -> Tensor | None:
    """[U, H], as the operators take them, with zeros for a missing one as long as the first. It remembers the
    vectors for prepack(), which goes by the tensors that users hold."""
    if not vectors:
        return None
    held = [v for v in vectors if v is not None]
    whole = [torch.zeros_like(held[0]) if v is None else v for v in vectors]
    u = torch.cat(whole).view(cell.vectors, -1)
    if not _autograd._is_traced():
        u.joined = held  # type: ignore[attr-defined]
    return u


def scan_weights(name: str, weights: _autograd.Weights) -> _autograd.Weights:
    """Those that the scan itself takes."""
    if not CELLS[name].takes_gates:
        return weights
    return [w if i % SLOTS in (W_HH, U) else None for i, w in enumerate(weights)]


def _normed_gates(x: Tensor, weights: _autograd.Weights, rows: Rows) -> Tensor:
    """gain_ih n(W_ih x) + b_ih [N, D*G*H] of all steps at once; W_ih x + b_ih without a gain."""
    x, gates = rows.without_padding(x), []
    for d in range(0, len(weights), SLOTS):
        w_ih, _, b_ih, _, gain, _ = weights[d : d + SLOTS]
        a = torch.nn.functional.linear(x, w_ih, b_ih if gain is None else None)  # type: ignore[arg-type]
        if gain is None:
            gates.append(a)
        elif _autograd._is_dual():  # torch's derivative of its own tangent is wrong
            a = gain * reference._normed(a)
            gates.append(a if b_ih is None else a + b_ih)
        else:
            gates.append(torch.nn.functional.layer_norm(a, gain.shape, gain, b_ih))
    return torch.cat(gates, -1) if len(gates) > 1 else gates[0]


def stack_weights(
    name: str, params: Sequence[Tensor], has_biases: bool, num_layers: int, bidirectional: bool
) -> list[_autograd.Weights]:
    """Of each layer, from all parameters in torch's order, one direction after the other: w_ih [G*H, I],
    w_hh [G*H, P], with biases b_ih and b_hh [G*H] (some cells have b_ih alone), the others of ``slots``."""
    each = len(params) // (num_layers * (2 if bidirectional else 1))
    biases = CELLS[name].biases if has_biases else 0
    directions = []
    for k in range(0, len(params), each):
        w_ih, w_hh, *others = params[k : k + each]
        b_ih, b_hh = (*others[:biases], None, None)[:2]
        directions.append(slots(name, w_ih, w_hh, b_ih, b_hh, *others[biases:]))
    if not bidirectional:
        return directions  # type: ignore[return-value]
    return [(*there, *back) for there, back in zip(directions[::2], directions[1::2], strict=True)]


def layer(
    name: str,
    x: Tensor,
    states: Sequence[Tensor],
    weights: _autograd.Weights,
    rows: Rows,
    keep_history: bool = False,
    composed: bool = False,
    listener: _autograd.Listener | None = None,
    options: StepOptions = NO_OPTIONS,
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """Scans one cell over time, as ``_autograd.scan``. ``composed`` makes it from torch operations, for what
    has no kernel."""
    x = _as(states[0].dtype, x)
    of_results, takes_gates = x.dtype, CELLS[name].takes_gates
    products = None if x.is_cuda or composed else dtype_of_products(x, x.shape[0], weights)
    if products is not None:
        matrices = (W_HH,) if takes_gates else (W_IH, W_HH, W_HR)
        weights = [
            w if w is None else _as(products if i % SLOTS in matrices else torch.float32, w)
            for i, w in enumerate(weights)
        ]
        x = _as(torch.float32 if takes_gates else products, x)
        states, options = [_as(torch.float32, state) for state in states], options.in_float32()
    if takes_gates:
        with _autograd._without_autocast(x):
            x, weights = _normed_gates(x, weights, rows), scan_weights(name, weights)
    if composed and becomes_a_node():
        from . import onnx  # registers operators, which nobody else needs

        return onnx.layer(name, x, states, weights, rows, keep_history, torch.compiler.is_compiling())
    if composed:
        if rows.lengths is not None:  # no transform traces the number of rows that still go on
            happens = rows.happens(x.device)
            x, options = rows.without_padding(x), options._replace(happens=happens)
            reset = None if rows.reset is None else rows.reset & happens
            rows = rows._replace(lengths=None, reset=reset)
        with _autograd._without_autocast(x):
            return reference.forward(CELLS[name], rows, x, states, weights, options)
    y, last, history = _autograd.scan(name, x, states, weights, rows, keep_history, listener, options)
    if products is None:
        return y, last, history
    return _as(of_results, y), [_as(of_results, t) for t in last], [_as(of_results, t) for t in history]


# Which instructions multiply bfloat16 matrices on the CPU, with sums in float32; "": none.
_BFLOAT16_PRODUCTS = torch.ops.fastrnn.cpu_bfloat16()


def dtype_of_products(like: Tensor, N: int, weights: _autograd.Weights) -> torch.dtype | None:
    """What a layer of N rows with numbers like these multiplies, in 16 bits on the CPU or in float32 under
    autocast: bfloat16 where the processor has instructions for it, else float32. States and sums are float32.
    None: a layer in float32 or float64 as it is."""
    given = like.dtype
    if given is torch.float32 and like.is_cpu and torch.is_autocast_enabled("cpu"):
        # Under autocast the matrices are rounded in each call, which takes longer than products of few rows.
        cast = N > 16 and not _prepack.has_pack(weights)
        given = torch.get_autocast_dtype("cpu") if cast else given
    if given is torch.bfloat16 and _BFLOAT16_PRODUCTS and like.is_cpu and weights[W_HH] is not None:
        return torch.bfloat16
    return torch.float32 if like.dtype in SUMMED_IN_FLOAT32 else None


def note_of_products(products: torch.dtype | None) -> str:
    """explain()'s words for what ``dtype_of_products`` gives."""
    if products is None:
        return ""
    return ", in float32" + f" with products of bfloat16 ({_BFLOAT16_PRODUCTS})" * (
        products is torch.bfloat16
    )


def _as(dtype: torch.dtype, t: Tensor) -> Tensor:
    """t.to(dtype), not called where t has that dtype: it takes a microsecond even then."""
    return t if t.dtype is dtype else t.to(dtype)


def _dropout(y: Tensor, p: float, rows: Rows) -> Tensor:
    """torch.dropout on the rows. The mask is drawn time-major, as in torch.nn, so that a seed gives the same
    one."""
    if rows.batch_sizes is not None or not rows.batch_first:
        return torch.dropout(y, p, True)
    noise = torch.dropout(y.new_ones(rows.T, rows.B, y.shape[1]), p, True)
    return (rows.dense(y) * noise.transpose(0, 1)).flatten(0, 1)


def lowered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, cast to the dtype of CUDA's autocast where that is on: torch.nn casts all tensors of a
    recurrent layer or cell there."""
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
    """The dtypes of torch.nn's h and c under the CPU's autocast, to which the results are cast; None without
    autocast. The kernels compute in the dtype of the weights.

    Autocast casts all tensors of an RNN, its cell and oneDNN's LSTM (``dense``). In other layers it casts the
    matrix products alone: the state that is combined with them (c of an LSTM) keeps its dtype, and the result
    has the wider of the two. float64 and tensors on other devices stay as they are."""
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
    params: Sequence[Tensor],
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
    reset_to: Sequence[Tensor] | None,
    options: Mapping[str, Any],
) -> tuple[Tensor, ...]:
    """Layers one after the other, dropout between them: y [N, D*P] and h_n [L*D, B, P], c_n [L*D, B, H], or
    all states, h [T, L*D, B, P] and c [T, L*D, B, H]. reset_to: for each state [L*D, B, *] or [T, L*D, B, *];
    options: those of ``step_options``, by name. All layers of a reversed stack run on reversed rows."""
    D = 2 if bidirectional else 1
    dtype = params[1].dtype
    hx = [_as(dtype, h) for h in hx]
    given, reverse = rows, options.get("reverse", False)
    if reverse:
        x = given.reversed(x)
        rows = given._replace(reset=None if given.reset is None else given.reversed(given.reset))
    p_x = step_options.pair(options.get("variational_dropout", 0.0))[0] if options and train else 0.0
    step = NO_OPTIONS
    results: list[tuple[Tensor, ...]] = []
    for index, weights in enumerate(stack_weights(name, params, has_biases, num_layers, bidirectional)):
        states = hx if num_layers == 1 else [h[index * D : (index + 1) * D] for h in hx]
        listener = None if state_hook is None else partial(_tell, state_hook, index, given, reverse)
        if p_x > 0:
            x = step_options.masked_input(x, p_x, rows)
        if options:
            step = step_options.draw(options, train, rows, x.shape[0], states)
        if reset_to is not None:
            step = step._replace(reset_to=tuple(t[..., index * D : (index + 1) * D, :, :] for t in reset_to))
        scan = partial(layer, name)
        if "memory" in options:
            scan = partial(_recompute.layer, scan, options["memory"])
        x, last, history = scan(x, states, weights, rows, return_states, composed, listener, step)
        if return_states:
            every = (x.unflatten(1, (D, -1)), *(t.transpose(0, 1) for t in history))
            last = [given.states(given.reversed(t) if reverse else t) for t in every]
        results.append(tuple(last))
        if dropout > 0 and train and index < num_layers - 1:
            x = _dropout(x, dropout, rows)
    if reverse:
        x = given.reversed(x)
    if num_layers == 1:
        return x, *results[0]
    dim = 1 if return_states else 0
    return x, *(torch.cat(part, dim) for part in zip(*results, strict=True))


def _tell(hook: StateHook, layer: int, rows: Rows, reverse: bool, complete: Sequence[Tensor]) -> None:
    if reverse:
        complete = [rows.reversed(t[0]).unsqueeze(0) for t in complete]
    dh, *others = complete
    hook(StateGradients(layer, rows, dh, others[0] if others else None))


def as_lengths(lengths: Tensor | Sequence[int]) -> Tensor:
    """The lengths as a tensor; a list becomes a CPU tensor, whatever the default device is."""
    return lengths if isinstance(lengths, Tensor) else torch.as_tensor(lengths, device="cpu")


def _has_numbers(t: Tensor) -> bool:
    """Whether the values can be read: not during a trace or a transform, nor from a fake or meta tensor."""
    is_symbolic = _autograd._is_traced() or torch.jit.is_tracing() or isinstance(t, FakeTensor)
    return not (is_symbolic or t.is_meta)


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


def dense_rows(T: int, B: int, batch_first: bool, lengths: Lengths | None, reset: Tensor | None) -> Rows:
    """The rows of a dense sequence, with what a user gives of lengths and reset."""
    return Rows(
        T,
        B,
        batch_first,
        lengths=None if lengths is None else _lengths(lengths, T, B),
        reset=None if reset is None else _reset(reset, T, B, batch_first),
    )


def _reset_to(reset_to, reset: Tensor | None, hidden: Sequence[Tensor], T: int) -> list[Tensor]:
    """The states of a reset as given, checked: of each state [L*D, B, *] or [T, L*D, B, *]."""
    if reset is None:
        raise ValueError(
            "reset_to needs reset, which says at which steps the states become those of reset_to"
        )
    many = len(hidden) > 1
    if many and (not isinstance(reset_to, (tuple, list)) or len(reset_to) != len(hidden)):
        raise TypeError(f"reset_to must be (h, c) as hx, got {type(reset_to).__name__}")
    states = list(reset_to) if many else [reset_to]
    for i, (state, h) in enumerate(zip(states, hidden, strict=True)):
        which = f"reset_to[{i}]" if many else "reset_to"
        if not isinstance(state, Tensor):
            raise TypeError(f"{which} must be a tensor, got {type(state).__name__}")
        constant, stepwise = list(h.shape), [T, *h.shape]
        if list(state.shape) not in (constant, stepwise):
            letters = f"L*D, B, {'H' if i or not many else 'P'}"
            raise ValueError(
                f"{which} must be [{letters}] = {constant} or [T, {letters}] = {stepwise}, "
                f"got {list(state.shape)}"
            )
    return states


def _in_order(state: Tensor, rows: Rows, reverse: bool) -> Tensor:
    """A state of a reset of each step in the order in which a layer goes through the steps. One for all steps
    is repeated where its gradient would be summed in 16 bits."""
    if state.dim() == 3 or not reverse:
        repeated = state.dim() == 3 and state.dtype in SUMMED_IN_FLOAT32
        return state.expand(rows.T, *state.shape) if repeated else state
    return rows.states(rows.reversed(rows.of_states(state)))


def _recurrent(
    name: str,
    args: tuple,
    lengths=None,
    reset=None,
    return_states: bool = False,
    state_hook: StateHook | None = None,
    *,
    reset_to=None,
    acts: Mapping[str, Any] = _NOTHING,
) -> tuple[Tensor, ...]:
    """torch.lstm and its siblings: dense (input, hx, params, has_biases, num_layers, dropout, train,
    bidirectional, batch_first) or packed (data, batch_sizes, hx, params, has_biases, num_layers, dropout,
    train, bidirectional). reset_to: states as hx, or of every step; acts: options by name, of those in
    ``step_options.NAMES``."""
    packed = isinstance(args[3], (list, tuple))
    extended = lengths is not None or reset is not None or return_states or reset_to is not None
    if packed:
        x, batch_sizes, hx, params, *options = args
        if extended:
            raise ValueError(
                "lengths, reset, reset_to and return_states take dense sequences, not packed ones"
            )
    else:
        x, hx, params, *options, batch_first = args
    cell = CELLS[name]
    hidden = tuple(hx) if cell.states > 1 else (hx,)
    extended = extended or name not in _TORCHS or len(acts) > 0
    torch_path = takes_torch_path(params[0], extended)
    if state_hook is not None and (torch_path or _autograd._is_traced()):
        reason = torch_path_reason(params[0], extended)
        raise RuntimeError(
            "the gradients of the states come from the kernels in ordinary calls: "
            + (reason or "there are none in torch.compile, torch.export and torch.func")
        )
    if torch_path and becomes_a_node():
        _refuse_onnx_between_steps(acts, options[3], reset_to)
    elif torch_path and not extended:
        return getattr(torch, name)(*args)
    to: list[Tensor] | None = None
    if reset_to is not None:
        to = _reset_to(reset_to, reset, hidden, x.shape[1 if batch_first else 0])
    _check_attributes(x, hidden if to is None else (*hidden, *to), params)
    params = lowered(params)
    if packed:
        rows = Rows(batch_sizes.shape[0], hidden[0].shape[1], batch_sizes=batch_sizes)
        flat = x
    else:
        B, T = (x.shape[0], x.shape[1]) if batch_first else (x.shape[1], x.shape[0])
        if not isinstance(T, Tensor) and T == 0:  # in a trace T is a tensor
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        rows = dense_rows(T, B, batch_first, lengths, reset)
        flat = x.flatten(0, 1)
    if to is not None:
        to = [_in_order(_as(params[1].dtype, t), rows, acts.get("reverse", False)) for t in to]
    projected = len(hidden) == 2 and hidden[0].shape[2] != hidden[1].shape[2]
    dtypes = _autocast_dtypes(name, x, hidden, params[0], projected, dense=not packed)
    y, h, *c = _stack(
        name, flat, hidden, params, rows, *options,
        return_states=return_states, composed=torch_path, state_hook=state_hook, reset_to=to, options=acts,
    )  # fmt: skip
    return _autocast_results(dtypes, (y if packed else rows.dense(y), h), c)


@overload
def lstm(
    input: Tensor, hx: Sequence[Tensor], params: Parameters, has_biases: bool, num_layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool, /, *,
    lengths: Lengths | None = None, reset: Tensor | None = None, return_states: bool = False,
    state_hook: StateHook | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
@overload
def lstm(
    data: Tensor, batch_sizes: Tensor, hx: Sequence[Tensor], params: Parameters, has_biases: bool,
    num_layers: int, dropout: float, train: bool, bidirectional: bool, /, *,
    state_hook: StateHook | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
def lstm(*args, lengths=None, reset=None, return_states=False, state_hook=None):
    """``torch.lstm``, the layers of an LSTM: (output, h_n, c_n), of

        lstm(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
        lstm(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional)

    input is [T, B, I], or [B, T, I] with batch_first; data [N, I] and batch_sizes [T] are those of a
    PackedSequence. hx is (h_0 [L*D, B, P], c_0 [L*D, B, H]). params are the parameters in the order in which
    torch.nn.LSTM has them, without biases if not has_biases.

    The dense form also takes ``lengths`` (integers [B], any order, zeros allowed: output is zero beyond, h_n
    and c_n are the states at each length), ``reset`` (bool [T, B], [B, T] with batch_first: the state is
    zeroed before that step) and ``return_states``: (output, h [T, L*D, B, P], c [T, L*D, B, H]), every state.
    Both call ``state_hook`` with the ``StateGradients`` of each layer whenever back-propagation passes it.

    Example:
        >>> import fastrnn, torch
        >>> lstm = fastrnn.LSTM(8, 16)
        >>> x, h_0, c_0 = torch.randn(20, 3, 8), torch.zeros(1, 3, 16), torch.zeros(1, 3, 16)
        >>> options = True, 1, 0.0, False, False, False
        >>> y, h_n, c_n = fastrnn.functional.lstm(x, (h_0, c_0), list(lstm.parameters()), *options)
        >>> torch.equal(y, lstm(x)[0])
        True
    """
    return _recurrent("lstm", args, lengths, reset, return_states, state_hook)


def lstm_peephole(
    *args, lengths=None, reset=None, return_states: bool = False, state_hook: StateHook | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``lstm`` with peepholes: after the parameters of a direction that ``torch.lstm`` takes come its
    weight_ci, weight_cf and weight_co [H]."""
    return _recurrent("lstm_peephole", args, lengths, reset, return_states, state_hook)  # type: ignore[return-value]


def lstm_layer_norm(
    *args, lengths=None, reset=None, return_states: bool = False, state_hook: StateHook | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``lstm`` with layer normalisation: after the parameters of a direction that ``torch.lstm`` takes come
    its gain_ih and gain_hh [4*H], gain_c and shift_c [H]. There is no projection."""
    return _recurrent("lstm_layer_norm", args, lengths, reset, return_states, state_hook)  # type: ignore[return-value]


def lstm_coupled(
    *args, lengths=None, reset=None, return_states: bool = False, state_hook: StateHook | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``lstm`` with i = 1 - f: its weights and biases are [3*H, *], gates f, g, o."""
    return _recurrent("lstm_coupled", args, lengths, reset, return_states, state_hook)  # type: ignore[return-value]


def slstm(
    *args, lengths=None, reset=None, return_states: bool = False, state_hook: StateHook | None = None
) -> tuple[Tensor, ...]:
    """The layers of ``SLSTM``: (output, h_n, c_n, n_n, m_n). Arguments as ``lstm`` has them, with hx (h_0,
    c_0, n_0, m_0), each [L*D, B, H], and parameters w_ih [4*H, I], w_hh [4*H, H] and with biases b_ih
    [4*H]."""
    return _recurrent("slstm", args, lengths, reset, return_states, state_hook)


class _SingleState(Protocol):
    """``torch.gru`` and its siblings, dense and packed."""

    @overload
    def __call__(
        self, input: Tensor, hx: Tensor, params: Parameters, has_biases: bool, num_layers: int,
        dropout: float, train: bool, bidirectional: bool, batch_first: bool, /, *,
        lengths: Lengths | None = None, reset: Tensor | None = None, return_states: bool = False,
        state_hook: StateHook | None = None,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip
    @overload
    def __call__(
        self, data: Tensor, batch_sizes: Tensor, hx: Tensor, params: Parameters, has_biases: bool,
        num_layers: int, dropout: float, train: bool, bidirectional: bool, /, *,
        state_hook: StateHook | None = None,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def _single_state(name: str) -> _SingleState:
    def layers(*args, lengths=None, reset=None, return_states=False, state_hook=None):
        return _recurrent(name, args, lengths, reset, return_states, state_hook)

    layers.__name__ = layers.__qualname__ = name
    layers.__doc__ = f"``torch.{name}``: (output, h_n). Arguments as ``lstm`` has them, with h_0 alone as hx."
    return layers  # type: ignore[return-value]


gru = _single_state("gru")
rnn_tanh = _single_state("rnn_tanh")
rnn_relu = _single_state("rnn_relu")


def gru_layer_norm(
    *args, lengths=None, reset=None, return_states: bool = False, state_hook: StateHook | None = None
) -> tuple[Tensor, Tensor]:
    """``gru`` with layer normalisation of both products: after the parameters of a direction that
    ``torch.gru`` takes come its gain_ih and gain_hh [3*H]."""
    return _recurrent("gru_layer_norm", args, lengths, reset, return_states, state_hook)  # type: ignore[return-value]


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


def _cell(
    name: str, input: Tensor, hx, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None,
    *vectors: Tensor, acts: Mapping[str, Any] = _NOTHING, train: bool = False,
):  # fmt: skip
    """``torch.<name>_cell``, and what torch has not: other cells, and the options of ``step_options``.
    Without units (H = 0) there is nothing to compute, and no kernel for it."""
    extended = name not in _TORCHS or (len(acts) > 0 and w_hh.shape[-1] > 0)
    torch_path = w_hh.shape[-1] == 0 or takes_torch_path(w_ih, extended)
    if node := torch_path and becomes_a_node():
        _refuse_onnx_between_steps(acts, train)
    if torch_path and not extended and (w_hh.shape[-1] == 0 or not node):
        return getattr(torch, f"{name}_cell")(input, hx, w_ih, w_hh, b_ih, b_hh)
    hidden = tuple(hx) if CELLS[name].states > 1 else (hx,)
    _check_cell(input, hidden, w_ih, w_hh)
    weights: list[Tensor | None] = [w_ih, w_hh, b_ih, b_hh, *vectors]
    _check_attributes(input, hidden, [w for w in weights if w is not None])
    if input.is_cuda:
        weights = [None if w is None else lowered((w,))[0] for w in weights]
        input, *hidden = lowered((input, *hidden))  # type: ignore[assignment]
    dtypes = _autocast_dtypes(name, input, hidden, w_hh, projected=False, dense=False)
    if dtypes is not None:
        input, *hidden = (t.to(w_hh.dtype) for t in (input, *hidden))  # type: ignore[assignment]
    states = [h.unsqueeze(0) for h in hidden]
    rows = Rows(1, input.shape[0])
    step = NO_OPTIONS
    if acts:
        step = step_options.draw(acts, train, rows, rows.B, states)
    of_layer = slots(name, *weights)  # type: ignore[arg-type]
    h, (_, *others), _ = layer(name, input, states, of_layer, rows, composed=torch_path, options=step)
    results = _autocast_results(dtypes, (h,), [state.squeeze(0) for state in others])
    return results if others else results[0]


def lstm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``torch.lstm_cell``: input [B, I], hx = (h, c) [B, H] -> (h, c)."""
    return _cell("lstm", input, hx, w_ih, w_hh, b_ih, b_hh)


def lstm_peephole_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_ci: Tensor,
    w_cf: Tensor,
    w_co: Tensor,
) -> tuple[Tensor, Tensor]:
    """``lstm_cell`` with peepholes w_ci, w_cf and w_co [H]; both biases may be None."""
    return _cell("lstm_peephole", input, hx, w_ih, w_hh, b_ih, b_hh, w_ci, w_cf, w_co)


def lstm_layer_norm_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    gain_ih: Tensor,
    gain_hh: Tensor,
    gain_c: Tensor,
    shift_c: Tensor,
) -> tuple[Tensor, Tensor]:
    """``lstm_cell`` with layer normalisation: gain_ih and gain_hh [4*H], gain_c and shift_c [H]."""
    vectors = gain_ih, gain_hh, gain_c, shift_c
    return _cell("lstm_layer_norm", input, hx, w_ih, w_hh, b_ih, b_hh, *vectors)


def lstm_coupled_cell(
    input: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``lstm_cell`` with i = 1 - f: its weights and biases are [3*H, *], gates f, g, o."""
    return _cell("lstm_coupled", input, hx, w_ih, w_hh, b_ih, b_hh)


class _SingleStateCell(Protocol):
    def __call__(
        self, input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor,
        b_ih: Tensor | None = None, b_hh: Tensor | None = None,
    ) -> Tensor: ...  # fmt: skip


def _single_state_cell(name: str) -> _SingleStateCell:
    def cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
        return _cell(name, input, hx, w_ih, w_hh, b_ih, b_hh)

    cell.__name__ = cell.__qualname__ = f"{name}_cell"
    cell.__doc__ = f"``torch.{name}_cell``: input [B, I], hx [B, H] -> h [B, H]."
    return cell


gru_cell = _single_state_cell("gru")
rnn_tanh_cell = _single_state_cell("rnn_tanh")
rnn_relu_cell = _single_state_cell("rnn_relu")


def gru_layer_norm_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    gain_ih: Tensor,
    gain_hh: Tensor,
) -> Tensor:
    """``gru_cell`` with layer normalisation: gain_ih and gain_hh [3*H]."""
    return _cell("gru_layer_norm", input, hx, w_ih, w_hh, b_ih, b_hh, gain_ih, gain_hh)


# ---- The linear scan ---------------------------------------------------------------------------------


def linear_scan(
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    *,
    batch_first: bool = False,
    reverse: bool = False,
    lengths: Lengths | None = None,
    reset: Tensor | None = None,
) -> Tensor:
    """h_t = a_t * h_{t-1} + b_t, elementwise, for every step t: the recurrence under ``MinGRU`` and its
    siblings, and under linear state space models with a diagonal matrix.

    On the CPU the units lie in vectors and rows are shared by torch's threads; on CUDA devices the steps run
    side by side too, in chunks (Martin and Cundy 2018). Differentiable any number of times, in reverse and
    forward mode, under ``vmap`` and ``torch.compile``.

    Args:
        a, b: [T, B, H], or [B, T, H] with batch_first.
        h0: the state before the first step [B, H], zeros if None.
        reverse: h_t = a_t * h_{t+1} + b_t, from each row's end to its start.
        lengths: integers [B] on any device, in any order, zeros allowed. Steps beyond a row's length do not
            happen: h is zero there.
        reset: bool [T, B] ([B, T] with batch_first): a_t counts as zero there.

    Returns:
        h, of the shape and dtype of a. float16 and bfloat16 are summed in float32.

    Raises:
        TypeError: lengths that are no integers, reset that is not bool.
        ValueError: tensors of other sizes than above, T = 0, lengths outside [0, T].
        RuntimeError: tensors of several dtypes or devices.

    Example:
        >>> import fastrnn, torch
        >>> a, b = torch.full((4, 1, 1), 0.5), torch.ones(4, 1, 1)  # [T, B, H]
        >>> fastrnn.functional.linear_scan(a, b).flatten()
        tensor([1.0000, 1.5000, 1.7500, 1.8750])
    """
    if a.dim() != 3:
        letters = "[B, T, H]" if batch_first else "[T, B, H]"
        raise ValueError(f"a must be {letters}, got {list(a.shape)}")
    if b.shape != a.shape:
        raise ValueError(f"b must have the shape of a, {list(a.shape)}, got {list(b.shape)}")
    T, B, H = a.shape[int(batch_first)], a.shape[int(not batch_first)], a.shape[2]
    if T == 0:
        raise ValueError("linear_scan needs at least one step, got T = 0")
    if h0 is None:
        h0 = a.new_zeros(B, H)
    elif tuple(h0.shape) != (B, H):
        raise ValueError(f"h0 must be [B, H] = [{B}, {H}], got {list(h0.shape)}")
    for name, t in (("b", b), ("h0", h0)):
        if t.dtype != a.dtype or t.device != a.device:
            raise RuntimeError(f"{name} must be {a.dtype} on {a.device}, as a, got {t.dtype} on {t.device}")
    rows = dense_rows(T, B, batch_first, lengths, reset)
    return rows.dense(scan_linearly(a.flatten(0, 1), b.flatten(0, 1), h0, rows, reverse)[0])


def no_linear_scan_reason(a: Tensor) -> str | None:
    """Why a linear scan is made from torch operations, or None if there is a kernel for it."""
    return None if a.is_cpu and a.dtype in SUMMED_IN_FLOAT32 else no_kernel_reason(a)


def scan_linearly(a: Tensor, b: Tensor, h0: Tensor, rows: Rows, reverse: bool) -> tuple[Tensor, Tensor]:
    """``linear_scan`` on rows [N, H] in any form: (h [N, H], the state after each row's last step [B, H])."""
    if a.is_cpu and a.dtype in SUMMED_IN_FLOAT32:
        h, last = _linear.scan(a.float(), b.float(), h0.float(), rows, reverse)
        return h.to(a.dtype), last.to(a.dtype)
    if becomes_a_node():
        refuse_onnx("linear scans")
    function = _linear.composed if takes_torch_path(a, extended=True) else _linear.scan
    return function(a, b, h0, rows, reverse)
