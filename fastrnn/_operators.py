"""The operators: what torch asks of them besides kernels, and those of their parts that are torch operations.

Their schemas, with all shapes, stand in csrc/common/operators.h.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _C, _cuda  # noqa: F401  (_C registers the operators)
from .reference import CELLS, SLOTS, W_HH, W_HR, W_IH, Cell
from .rows import Rows

Maybe = Tensor | None


class Keep:
    """What a scan keeps beside y and the last states."""

    NOTHING = 0
    FOR_BACKWARD = 1
    HISTORY = 2


# ---- Options that act on the states between the steps ---------------------------------------------------

RECURRENT, FRESH, RESET_TO = 3, 4, 6  # slots of their tensors


def with_options(numbers, masks: Sequence[Maybe], reset_to: Sequence[Maybe], fresh=(None, None)) -> tuple:
    """The last arguments of an operator's overload with options; none where no option acts
    (StepOptions.numbers). fresh: h and c before their zoneout, on the way back."""
    if numbers is None:
        return ()
    tensors = (*masks, *fresh, *reset_to)
    slots = sum(1 << slot for slot, t in enumerate(tensors) if t is not None)
    return [t for t in tensors if t is not None], slots, numbers


def option(options: Sequence[Tensor] | None, slots: int, slot: int) -> Maybe:
    """The tensor in a slot."""
    if options is None or not slots >> slot & 1:
        return None
    return options[(slots & ((1 << slot) - 1)).bit_count()]


def zoned_after(cell: Cell, numbers: Sequence[float] | None) -> list[int]:
    """The states of which a scan also keeps what they are before their zoneout: the way back reads that."""
    if numbers is None:
        return []
    return [k for k in range(min(2, cell.states)) if numbers[k] > 0 and cell.reads_after >> k & 1]


# ---- Fake kernels: the shapes of the results ---------------------------------------------------------


@torch.library.register_fake("fastrnn::scan")
@torch.library.register_fake("fastrnn::scan.options")
def _(
    cell, x, states, weights, slots, packed, batch_sizes, lengths, reset, batch_first, keep, options=None,
    option_slots=0, numbers=None,
):  # fmt: skip
    info, like = CELLS[cell], states[0]
    (D, _, P), N, H = like.shape, x.shape[0], states[-1].shape[2]
    if packed is None:
        H = weights[0].shape[0] // info.gates
    saved = []
    if keep == Keep.FOR_BACKWARD:
        widths = [info.saved * H + info.row_numbers] if info.saved else []
        widths += [(P, H)[k] for k in zoned_after(info, numbers)]
        saved = [like.new_empty(D, N, width) for width in widths]
    return (
        like.new_empty(N, D * P),
        [torch.empty_like(state, memory_format=torch.contiguous_format) for state in states],
        [like.new_empty(D, N, H) for _ in states[1:] if keep != Keep.NOTHING],
        saved,
    )


@torch.library.register_fake("fastrnn::scan_backward")
@torch.library.register_fake("fastrnn::scan_backward.options")
def _(cell, dy, dlast, dhistory, y, history, saved, states, weights, slots, *others):
    dgates_width = CELLS[cell].gradients * weights[0].shape[0] // CELLS[cell].gates
    dgates = y.new_empty(states[0].shape[0], y.shape[0], dgates_width)
    return dgates, *_scanned_back(cell, y, states, weights, slots, *others[4:])


@torch.library.register_fake("fastrnn::scan_backward.over")
@torch.library.register_fake("fastrnn::scan_backward.over_options")
def _(cell, dy, dlast, dhistory, y, history, saved, states, weights, slots, *others):
    return _scanned_back(cell, y, states, weights, slots, *others[4:])


def _scanned_back(
    cell: str, y, states, weights, slots: int, keep: bool, options=None, option_slots=0, numbers=None
) -> tuple[list[Tensor], ...]:
    (D, _, _), H, projected = (
        states[0].shape,
        weights[0].shape[0] // CELLS[cell].gates,
        bool(slots >> W_HR & 1),
    )
    resets = [option(options, option_slots, RESET_TO + k) for k in range(len(states))]
    return (
        [
            torch.empty_like(state, memory_format=torch.contiguous_format)
            for state in (*states, *resets)
            if state is not None
        ],
        [
            y.new_empty(D, y.shape[0], state.shape[2])
            for k, state in enumerate(states)
            if keep or (k == 0 and projected)
        ],
        [y.new_empty(CELLS[cell].vectors, H) for _ in range(D) if CELLS[cell].vectors],
    )


@torch.library.register_fake("fastrnn::weight_gradients")
@torch.library.register_fake("fastrnn::weight_gradients.options")
def _(cell, dgates, x, y, states, weights, slots, *others):
    *_, inputs, of_weights = others[:6]
    (D, _, P), GH = states[0].shape, weights[0].shape[0]
    dx = [torch.empty_like(x, memory_format=torch.contiguous_format)] if inputs else []
    shapes = {W_IH: (GH, x.shape[1]), W_HH: (GH, P)}
    slots = CELLS[cell].product_slots * D
    return dx, [y.new_empty(shapes.get(slot, (GH,))) for slot in slots if of_weights]


@torch.library.register_fake("fastrnn::linear_scan")
def _(a, b, h0, *rows_and_form):
    return b.new_empty(b.shape), h0.new_empty(h0.shape)


@torch.library.register_fake("fastrnn::pack")
def _(cell, weights, slots, storage=""):  # how long depends on the processor
    return weights[0].new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


# ---- The gradients of weights and input from torch operations ------------------------------------------


def input_gradients(cell: Cell, dgates: Tensor) -> Tensor:
    """The part of dgates [N, E*H] that belongs to the input's gates [N, G*H]: its last G blocks."""
    H = dgates.shape[-1] // cell.gradients
    return dgates[..., (cell.gradients - cell.gates) * H :]


def recurrent_gradients(cell: Cell, dgates: Tensor) -> Tensor:
    """The part of dgates [N, E*H] that belongs to the recurrent gates, in the order of W_hh [G*H, P]."""
    H = dgates.shape[-1] // cell.gradients
    first = dgates[..., : cell.gates * H]
    # The recurrent gradients of the split gates, which are the last ones, stand first in dgates; here they go
    # back to the end.
    split = cell.gradients - cell.gates
    return first.roll(-split * H, -1) if 0 < split < cell.gates else first


def composed_weight_gradients(
    name, dgates, x, y, states, weights, slots, batch_sizes, lengths, reset, batch_first, inputs, of_weights,
    options=None, option_slots=0, numbers=None,
):  # fmt: skip
    """The operator ``fastrnn::weight_gradients``, for vmap and for the tests."""
    cell, h0 = CELLS[name], states[0]
    D, B, P = h0.shape
    rows = Rows.of(x.shape[0], B, batch_first, batch_sizes, lengths, reset)
    sums = dgates.sum(1)
    if rounds_products(states, weights):
        dgates = dgates.bfloat16()
    dgx, w_ih = input_gradients(cell, dgates), weights[:: slots.bit_count()]
    dx = [sum(dgx[d] @ w_ih[d] for d in range(D))] if inputs else []
    if not of_weights:
        return dx, []
    dga = recurrent_gradients(cell, dgates)
    x, dweights = rows.without_padding(x), []
    for d in range(D):
        before = _operand(rows, y[:, d * P : (d + 1) * P], h0[d], d, options, option_slots).to(dga.dtype)
        of_x, of_h = input_gradients(cell, sums[d]), recurrent_gradients(cell, sums[d])
        found = (dgx[d].T @ x, dga[d].T @ before, of_x, of_h)
        dweights += [found[slot] for slot in cell.product_slots]
    return dx, dweights


def _operand(rows: Rows, y: Tensor, h0: Tensor, d: int, options, option_slots: int) -> Tensor:
    """What W_hh has multiplied in each row [N, P]."""
    mask, to = (option(options, option_slots, slot) for slot in (RECURRENT, RESET_TO))
    before = rows.previous(y, h0, d, None if to is None else to[..., d, :, :])
    if to is not None:  # which may hold anything where no step has a row
        before = rows.without_padding(before)
    return before if mask is None else before * rows.of_batch(mask[d])


def rounds_products(states: Sequence[Tensor], weights: Sequence[Maybe]) -> bool:
    """Whether the matrices are bfloat16 beside states in float32."""
    return states[0].dtype is torch.float32 and any(
        w is not None and w.dtype is torch.bfloat16 for w in weights
    )


def weight_gradients_of_torch(
    name, dgates, x, y, states, weights, slots, batch_sizes, lengths, reset, batch_first, inputs, of_weights,
    options=None, option_slots=0, numbers=None,
):  # fmt: skip
    """The operator ``fastrnn::weight_gradients`` on CUDA, and of bfloat16 matrices on the CPU, where torch's
    own products are the fastest. Like ``composed_weight_gradients``, without its copies of what is as large
    as the sequence."""
    cell, h0, w_ih = CELLS[name], states[0], weights[:: slots.bit_count()]
    D, B, P = h0.shape
    rows = Rows.of(x.shape[0], B, batch_first, batch_sizes, lengths, reset)
    sums = dgates.sum(1) if of_weights else None
    if rounds_products(states, weights):
        dgates = dgates.bfloat16()
    dgx, dx = input_gradients(cell, dgates), []
    if inputs:
        dx = [dgx[0] @ w_ih[0]]
        if D == 2:
            dx[0].addmm_(dgx[1], w_ih[1])
    if not of_weights:
        return dx, []
    GH, x = w_ih[0].shape[0], rows.without_padding(x)
    dweights: list[Tensor] = []
    for d in range(D):
        dga, h, dw_hh = dgates[d, :, :GH], y[:, d * P : (d + 1) * P], dgates.new_empty(GH, P)
        if not cell.dense:
            dweights += [dgx[d].T @ x, input_gradients(cell, sums[d]).clone()]
            continue
        masked = option_slots >> RECURRENT & 1
        moved = batch_first or batch_sizes is not None or (d == 1 and lengths is not None)
        if moved or reset is not None or masked:
            before = _operand(rows, h, h0[d], d, options, option_slots)
            torch.mm(dga.T, before.to(dga.dtype), out=dw_hh)
        else:  # the state before a row lies B rows before it, or is the initial one
            N, h, first = len(h), h.to(dga.dtype), h0[d].to(dga.dtype)
            begin, rest, before = (
                (slice(0, B), slice(B, N), slice(0, N - B))
                if d == 0
                else (slice(N - B, N), slice(0, N - B), slice(B, N))
            )
            torch.mm(dga[begin].T, first, out=dw_hh)
            if N > B:
                dw_hh.addmm_(dga[rest].T, h[before])
        if cell.takes_gates:
            dweights.append(dw_hh)
            continue
        db_hh, split = sums[d, :GH], cell.gradients - cell.gates
        if split:  # as in recurrent_gradients
            H = GH // cell.gates
            dw_hh, db_hh = dw_hh.roll(-split * H, 0), db_hh.roll(-split * H, 0)
        dweights += [dgx[d].T @ x, dw_hh, input_gradients(cell, sums[d]).clone(), db_hh.clone()]
    return dx, dweights


for overload in ("", ".options"):
    torch.library.impl(f"fastrnn::weight_gradients{overload}", "CUDA")(weight_gradients_of_torch)
_cuda.missing()  # or registers the scans

# Resolved once: looking an operator up by name costs some microseconds.
scan, scan_options = torch.ops.fastrnn.scan.default, torch.ops.fastrnn.scan.options
scan_backward = torch.ops.fastrnn.scan_backward.default
scan_backward_options = torch.ops.fastrnn.scan_backward.options
scan_backward_over = torch.ops.fastrnn.scan_backward.over
scan_backward_over_options = torch.ops.fastrnn.scan_backward.over_options
weight_gradients = torch.ops.fastrnn.weight_gradients.default
weight_gradients_options = torch.ops.fastrnn.weight_gradients.options
linear_scan = torch.ops.fastrnn.linear_scan.default


def given(weights: Sequence[Maybe]) -> tuple[list[Tensor], int]:
    """Of the weights, SLOTS for each direction, those that there are, and the set of their slots."""
    slots = sum([bit for bit, w in zip(_BITS, weights, strict=False) if w is not None])
    return [w for w in weights if w is not None], slots


_BITS = [1 << slot for slot in range(SLOTS)]  # of one direction: the other has the same
