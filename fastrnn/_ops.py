"""The operators as differentiable functions: one autograd Function a scan, from the table of cells.

The operators are the scan over time, its way back, and the products that give the gradients of weights and
input. vmap and further derivatives compose those products from torch operations, which they treat natively.
"""

from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _C, _cuda, _prepack, reference  # noqa: F401  (_C registers the operators)
from .reference import CELLS, Layout

Maybe = Tensor | None
Tensors = list[Tensor] | tuple[Tensor, ...]


class Sequence(NamedTuple):
    """How the rows [N, *] are laid out, and which of them take part."""

    batch_first: bool
    batch_sizes: Maybe = None  # packed: int64 [T] on the CPU
    lengths: Maybe = None  # dense: int64 [B] on the CPU
    reset: Maybe = None  # bool [N]

    def layout(self, N: int, B: int) -> Layout:
        return Layout(N, B, *self)


# ---- Fake kernels: the shapes of the results ---------------------------------------------------------


def _register_fakes(name: str) -> None:
    cell = CELLS[name]

    def scanned(x, h0, H, save):
        D, B, P = h0.shape
        N = x.shape[0]
        return (
            h0.new_empty(N, D * P),
            h0.new_empty(D, B, P),
            h0.new_empty(D, B, H) if cell.has_c else h0.new_empty(0),
            h0.new_empty(D, N, cell.saved * H) if save else h0.new_empty(0),
            h0.new_empty(D, N, H) if save and cell.has_c else h0.new_empty(0),
        )

    @torch.library.register_fake(f"fastrnn::{name}")
    def _(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, lengths, reset, batch_first, save):
        return scanned(x, h0, w_hh[0].shape[0] // cell.gates, save)

    @torch.library.register_fake(f"fastrnn::{name}_packed")
    def _(x, h0, c0, packed, batch_sizes, lengths, reset, batch_first, save):
        return scanned(x, h0, h0.shape[2] if c0 is None else c0.shape[2], save)

    @torch.library.register_fake(f"fastrnn::{name}_pack")
    def _(w_ih, w_hh, b_ih, b_hh, w_hr, bfloat16):  # how long depends on the processor
        return w_hh[0].new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)

    def scanned_back(
        in_place, dy, dh_n, dc_n, dsaved, dsaved_c, saved, saved_c, y, h0, c0, w_hh, w_hr, batch_sizes,
        lengths, reset, batch_first, keep,
    ):  # fmt: skip
        D, B, P = h0.shape
        N, H = y.shape[0], w_hh[0].shape[0] // cell.gates
        return (
            h0.new_empty(0) if in_place else h0.new_empty(D, N, cell.gradients * H),
            h0.new_empty(D, B, P),
            h0.new_empty(D, B, H) if cell.has_c else h0.new_empty(0),
            h0.new_empty(D, N, P) if w_hr or keep else h0.new_empty(0),
            h0.new_empty(D, N, H) if cell.has_c and keep else h0.new_empty(0),
        )

    torch.library.register_fake(f"fastrnn::{name}_backward", partial(scanned_back, False))
    if cell.in_place:
        torch.library.register_fake(f"fastrnn::{name}_backward_in_place", partial(scanned_back, True))

    @torch.library.register_fake(f"fastrnn::{name}_products")
    def _(dgates, x, y, h0, w_ih, batch_sizes, lengths, reset, batch_first, inputs, weights):
        D, _, P = h0.shape
        GH, I = w_ih[0].shape
        shapes = [(D, GH, I), (D, GH, P), (D, GH), (D, GH)]
        return (
            torch.empty_like(x, memory_format=torch.contiguous_format) if inputs else h0.new_empty(0),
            *(h0.new_empty(shape if weights else 0) for shape in shapes),
        )


def products_of_torch(
    cell, dgates, x, y, h0, w_ih, batch_sizes, lengths, reset, batch_first, inputs, weights
):
    """The operator ``fastrnn::<cell>_products`` on CUDA: torch's own products are the fastest there.
    Like ``_composed_products``, without its copies of what is as large as the sequence."""
    D, B, P = h0.shape
    nothing = dgates.new_empty(0)
    dgx = reference.input_gradients(cell, dgates)
    dx = nothing
    if inputs:
        dx = dgx[0] @ w_ih[0]
        if D == 2:
            dx.addmm_(dgx[1], w_ih[1])
    if not weights:
        return dx, nothing, nothing, nothing, nothing
    GH, I = w_ih[0].shape
    dw_ih, dw_hh = dgates.new_empty(D, GH, I), dgates.new_empty(D, GH, P)
    for d in range(D):
        torch.mm(dgx[d].T, x, out=dw_ih[d])
        dga, h = dgates[d, :, :GH], y[:, d * P : (d + 1) * P]
        if batch_first or batch_sizes is not None or reset is not None or (d == 1 and lengths is not None):
            torch.mm(dga.T, previous_rows(h, h0[d], Sequence(batch_first, batch_sizes, lengths, reset), d),
                     out=dw_hh[d])  # fmt: skip
            continue
        # The state before a row lies B rows before it, or is the initial one.
        N = len(h)
        begin, rest, before = (
            (slice(0, B), slice(B, N), slice(0, N - B))
            if d == 0
            else (slice(N - B, N), slice(0, N - B), slice(B, N))
        )
        torch.mm(dga[begin].T, h0[d], out=dw_hh[d])
        if N > B:
            dw_hh[d].addmm_(dga[rest].T, h[before])
    sums = dgates.sum(1)
    db_ih, db_hh = reference.input_gradients(cell, sums).clone(), sums[:, :GH]
    if cell.gradients > cell.gates:  # the gate that is kept apart stands first
        H = GH // cell.gates
        dw_hh, db_hh = dw_hh.roll(-H, 1), db_hh.roll(-H, 1)
    return dx, dw_ih, dw_hh, db_ih, db_hh


for _name in CELLS:
    _register_fakes(_name)
    torch.library.impl(f"fastrnn::{_name}_products", "CUDA")(partial(products_of_torch, CELLS[_name]))
_cuda.missing()  # or registers the scans

# Resolved once: looking an operator up by name costs some microseconds.
_FORWARD = {name: getattr(torch.ops.fastrnn, name).default for name in CELLS}
_PACKED = {name: getattr(torch.ops.fastrnn, f"{name}_packed").default for name in CELLS}
_BACKWARD = {name: getattr(torch.ops.fastrnn, f"{name}_backward").default for name in CELLS}
_IN_PLACE = {
    name: getattr(torch.ops.fastrnn, f"{name}_backward_in_place").default
    for name, cell in CELLS.items()
    if cell.in_place
}
_PRODUCTS = {name: getattr(torch.ops.fastrnn, f"{name}_products").default for name in CELLS}


# ---- Autograd ----------------------------------------------------------------------------------------
# Functions take tensors one by one: after x, h0, c0 come w_ih, w_hh, b_ih, b_hh, w_hr of all directions.


def _split(tensors: tuple, D: int, bias: bool, projected: bool) -> tuple[tuple, ...]:
    i = 4 * D if bias else 2 * D
    biases = (tensors[2 * D : 3 * D], tensors[3 * D : i]) if bias else ((), ())
    return (tensors[:D], tensors[D : 2 * D], *biases, tensors[i:] if projected else ())


class Scan(torch.autograd.Function):
    """(y, h_n, c_n, saved, saved_c) of one layer. The saved activations are outputs, and differentiable: this
    is how the second derivative finds its way back through them."""

    @staticmethod
    def forward(name, batch_first, bias, projected, batch_sizes, lengths, reset, x, h0, c0, *weights):
        lists = _split(weights, h0.shape[0], bias, projected)
        return _FORWARD[name](x, h0, c0, *lists, batch_sizes, lengths, reset, batch_first, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        name, batch_first, bias, projected, batch_sizes, lengths, reset, x, h0, c0, *weights = inputs
        y, _, _, saved, saved_c = output
        D = h0.shape[0]
        ctx.options = name, batch_first, bias, projected, D
        ctx.listener = None  # of the gradients of the states: see scan()
        ctx.set_materialize_grads(False)
        w_ih, w_hh, _, _, w_hr = _split(tuple(weights), D, bias, projected)
        ctx.save_for_backward(batch_sizes, lengths, reset, saved, saved_c, y, x, h0, c0, *w_ih, *w_hh, *w_hr)

    @staticmethod
    def backward(ctx: Any, dy, dh_n, dc_n, dsaved, dsaved_c):  # type: ignore[override]
        name, batch_first, bias, projected, D = ctx.options
        cell = CELLS[name]
        batch_sizes, lengths, reset, saved, saved_c, y, x, h0, c0, *weights = ctx.saved_tensors
        w_ih, recurrent_weights = weights[:D], weights[D:]
        if not cell.has_c:
            dc_n = dsaved_c = None
        if not cell.saved:
            dsaved = None
        keep = ctx.listener is not None
        arguments = (
            name, batch_first, keep, batch_sizes, lengths, reset, dy, dh_n, dc_n, dsaved, dsaved_c,
            saved, saved_c, y, h0, c0, *recurrent_weights,
        )  # fmt: skip
        wants_x, _, _, *wants_weights = ctx.needs_input_grad[7:]
        wants = _split(tuple(wants_weights), D, bias, projected)
        hidden = None  # h before its projection, from what is about to be written over
        if any(wants[4]):
            hidden = saved[:, :, 3 * saved_c.shape[2] :] * torch.tanh(saved_c)

        needed = _is_dual() or _needs_function(arguments[3:])
        if needed:
            dgates, dh0, dc0, dh, dc = _backward_function().apply(*arguments)
        elif cell.in_place and _is_last_use(saved):
            _, dh0, dc0, dh, dc = _IN_PLACE[name](*_scan_backward_operands(*arguments[1:]))
            dgates = saved
            torch.autograd.graph.increment_version(saved)
        else:
            dgates, dh0, dc0, dh, dc = ScanBackward.forward(*arguments)
        if keep:
            ctx.listener(dh.detach(), dc.detach())

        any_weights = any(any(want) for want in wants[:4])
        products: Callable = _PRODUCTS[name]
        if needed:
            products = partial(_composed_products, cell)
        elif x.is_cuda and not _is_traced():  # past the dispatcher, which takes longer than a product
            products = partial(products_of_torch, cell)
        dx, dw_ih, dw_hh, db_ih, db_hh = products(
            dgates, x, y, h0, w_ih, batch_sizes, lengths, reset, batch_first, wants_x, any_weights
        )
        dw_hr = None if hidden is None else dh.mT @ hidden
        flat = [
            gradient[d] if want[d] else None
            for gradient, want in zip((dw_ih, dw_hh, db_ih, db_hh, dw_hr), wants, strict=True)
            for d in range(D if want else 0)
        ]
        return (None,) * 7 + (dx if wants_x else None, dh0, dc0 if cell.has_c else None, *flat)

    @staticmethod
    def vmap(info, in_dims, name, batch_first, bias, projected, *args):
        V, dims = info.batch_size, in_dims[4:]
        if any(a is not None for a in args[:3]) or any(d is not None for d in dims[6:]):
            return _one_by_one(_scan_function(), V, (name, batch_first, bias, projected), args, dims)
        # Shared weights: the mapped dimension is a part of the batch.
        x, h0, c0 = (_front(a, d, V) for a, d in zip(args[3:6], dims[3:6], strict=True))
        B = h0.shape[2]
        y, h_n, c_n, saved, saved_c = _scan_function().apply(
            name, batch_first, bias, projected, None, None, None, _fold_rows(x, B, batch_first),
            _fold_state(h0), _fold_state(c0), *args[6:],
        )  # fmt: skip
        outputs = (
            _unfold_rows(y, V, B, batch_first),
            _unfold_state(h_n, V),
            _unfold_state(c_n, V),
            _unfold_saved(saved, V, B, batch_first),
            _unfold_saved(saved_c, V, B, batch_first),
        )
        return outputs, tuple(0 if o.dim() > 1 else None for o in outputs)


def _replaced(tensors: Iterable[Maybe], positions: list[int], by: Iterable[Tensor]) -> list[Maybe]:
    full = list(tensors)
    for i, t in zip(positions, by, strict=True):
        full[i] = t
    return full


def _reference_backward(options: tuple, saved: Iterable[Maybe], varying: list[int]):
    """The reference as a function of some of the tensors of a ScanBackward, the others as they were saved."""
    name, batch_first, keep = options
    batch_sizes, lengths, reset, *tensors = saved
    sequence = Sequence(batch_first, batch_sizes, lengths, reset)

    def function(*given: Tensor):
        full = _replaced(tensors, varying, given)
        y, h0 = full[7:9]
        D = h0.shape[0]
        layout = sequence.layout(y.shape[0], h0.shape[1])
        return reference.backward(CELLS[name], layout, *full[:10], full[10 : 10 + D], full[10 + D :], keep)

    return function


class EagerScan(Scan):
    """Scan for ordinary calls. torch inspects the signature of a Function with a setup_context at every call,
    which took a third of a single step."""

    setup_context = torch.autograd.Function.setup_context

    @staticmethod
    def forward(ctx, *inputs):  # type: ignore[override]
        output = Scan.forward(*inputs)
        Scan.setup_context(ctx, inputs, output)
        return output


def _is_last_use(saved: Tensor) -> bool:
    """Whether the back-propagation under way may write over what the forward scan saved for it: torch.compile
    asks the same before it gives such memory away."""
    keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
    return not _is_traced() and saved.is_contiguous() and not keeps_graph()


def _scan_backward_operands(
    batch_first, keep, batch_sizes, lengths, reset, dy, dh_n, dc_n, dsaved, dsaved_c, saved, saved_c, y, h0,
    c0, *weights,
):  # fmt: skip
    D = h0.shape[0]
    return (
        dy, dh_n, dc_n, dsaved, dsaved_c, saved, saved_c, y, h0, c0, weights[:D], weights[D:], batch_sizes,
        lengths, reset, batch_first, keep,
    )  # fmt: skip


class ScanBackward(torch.autograd.Function):
    """(dgates, dh0, dc0, dh, dc) of one layer; its own derivative is that of the reference."""

    @staticmethod
    def forward(name, *arguments):
        return _BACKWARD[name](*_scan_backward_operands(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.options = inputs[:3]
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):  # type: ignore[override]
        tensors = ctx.saved_tensors[3:]
        present = [i for i, t in enumerate(tensors) if t is not None and t.numel() > 0]
        function = _reference_backward(ctx.options, ctx.saved_tensors, present)
        _, vjp = torch.func.vjp(function, *(tensors[i] for i in present))
        return (None,) * 6 + tuple(_replaced([None] * len(tensors), present, vjp(tuple(gradients))))

    @staticmethod
    def vmap(info, in_dims, name, batch_first, keep, *args):
        V, dims = info.batch_size, in_dims[3:]
        if any(a is not None for a in args[:3]) or any(d is not None for d in dims[13:]):
            return _one_by_one(_backward_function(), V, (name, batch_first, keep), args, dims)
        dy, dh_n, dc_n, dsaved, dsaved_c, saved, saved_c, y, h0, c0 = (
            _front(a, d, V) for a, d in zip(args[3:13], dims[3:13], strict=True)
        )
        B = h0.shape[2]
        saves = [_fold_saved(t, B, batch_first) for t in (dsaved, dsaved_c, saved, saved_c)]
        dgates, dh0, dc0, dh, dc = _backward_function().apply(
            name, batch_first, keep, None, None, None, _fold_rows(dy, B, batch_first),
            _fold_state(dh_n), _fold_state(dc_n), *saves, _fold_rows(y, B, batch_first), _fold_state(h0),
            _fold_state(c0), *args[13:],
        )  # fmt: skip
        outputs = (
            _unfold_saved(dgates, V, B, batch_first),
            _unfold_state(dh0, V),
            _unfold_state(dc0, V),
            _unfold_saved(dh, V, B, batch_first),
            _unfold_saved(dc, V, B, batch_first),
        )
        return outputs, tuple(0 if o.dim() > 1 else None for o in outputs)


def _forward_mode_on(jvp):
    """torch turns forward mode off inside a jvp rule, which then drops the tangents of the levels around it
    in silence: the second derivative of jacfwd(jacfwd(f)) would be wrong."""

    @wraps(jvp)
    def rule(ctx: Any, *tangents):
        with forward_ad._set_fwd_grad_enabled(True):
            return jvp(ctx, *tangents)

    return rule


class DualScan(Scan):
    """Scan with a forward-mode derivative. A class of its own, because torch.compile refuses Functions that
    have one."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        Scan.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[4:])

    @staticmethod
    @_forward_mode_on
    def jvp(ctx: Any, *tangents):
        name, batch_first, bias, projected, D = ctx.options
        batch_sizes, lengths, reset, *tensors = _primals(ctx.saved_tensors)
        sequence = Sequence(batch_first, batch_sizes, lengths, reset)
        tangents = tangents[7:]
        moving = [i for i, t in enumerate(tangents) if t is not None]

        def function(*given):
            x, h0, c0, *weights = _replaced(tensors, moving, given)
            layout = sequence.layout(x.shape[0], h0.shape[1])
            return reference.forward(
                CELLS[name], layout, x, h0, c0, *_split(tuple(weights), D, bias, projected)
            )

        return _push_forward(function, [tensors[i] for i in moving], [tangents[i] for i in moving])


class DualScanBackward(ScanBackward):
    """ScanBackward with a forward-mode derivative: forward over reverse, as in torch.func.hessian."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ScanBackward.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[3:])

    @staticmethod
    @_forward_mode_on
    def jvp(ctx: Any, *tangents):
        saved = _primals(ctx.saved_tensors)
        tensors, tangents = saved[3:], tangents[6:]
        moving = [i for i, t in enumerate(tangents) if t is not None]
        function = _reference_backward(ctx.options, saved, moving)
        return _push_forward(function, [tensors[i] for i in moving], [tangents[i] for i in moving])


def _primals(tensors: tuple) -> list[Maybe]:
    """Without the tangents of this level, but with those of the levels around it."""
    return [None if t is None else forward_ad.unpack_dual(t).primal for t in tensors]


def _push_forward(function, at: list[Tensor], tangents: list[Tensor]) -> tuple:
    """J v as the transpose of v -> v^T J: forward mode cannot be nested in a jvp rule at its own level."""
    outputs, vjp = torch.func.vjp(function, *at)
    _, transpose = torch.func.vjp(vjp, tuple(torch.zeros_like(o) for o in outputs))
    return transpose(tuple(tangents))[0]


# ---- Helpers of vmap: the mapped dimension V, always first here, folded into the batch and out again ---


def _front(t: Maybe, dim: int | None, V: int) -> Maybe:
    if t is None:
        return None
    return t.expand(V, *t.shape) if dim is None else t.movedim(dim, 0)


def _one_by_one(function, V: int, options: tuple, args: tuple, dims: tuple):
    """Mapped weights, packed or ragged sequences: one call each."""
    results = [
        function.apply(
            *options, *(a if d is None else a.select(d, v) for a, d in zip(args, dims, strict=True))
        )
        for v in range(V)
    ]
    outputs = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return outputs, (0,) * len(outputs)


def _fold_state(t: Maybe) -> Maybe:  # [V, D, B, *] -> [D, V*B, *]
    return None if t is None else t.movedim(0, 1).flatten(1, 2)


def _unfold_state(t: Tensor, V: int) -> Tensor:
    return t if t.dim() == 1 else t.unflatten(1, (V, -1)).movedim(1, 0)


def _fold_rows(t: Maybe, B: int, batch_first: bool) -> Maybe:  # [V, N, *] -> [V*N, *]
    if t is None or batch_first:
        return None if t is None else t.flatten(0, 1)
    return t.unflatten(1, (-1, B)).movedim(0, 1).flatten(0, 2)


def _unfold_rows(t: Tensor, V: int, B: int, batch_first: bool) -> Tensor:
    if batch_first:
        return t.unflatten(0, (V, -1))
    return t.unflatten(0, (-1, V, B)).movedim(1, 0).flatten(1, 2)


def _fold_saved(t: Maybe, B: int, batch_first: bool) -> Maybe:  # [V, D, N, *] -> [D, V*N, *]
    if t is None or t.dim() < 4:  # [V, 0]: nothing is saved
        return None if t is None else t.new_empty(0)
    return torch.stack([_fold_rows(t[:, d], B, batch_first) for d in range(t.shape[1])])  # type: ignore[misc]


def _unfold_saved(t: Tensor, V: int, B: int, batch_first: bool) -> Tensor:
    if t.dim() == 1:
        return t
    return torch.stack([_unfold_rows(one, V, B, batch_first) for one in t], 1)


# ---- The products after the backward scan from torch operations: for vmap and further derivatives --------


def _composed_products(
    cell, dgates, x, y, h0, w_ih, batch_sizes, lengths, reset, batch_first, inputs, weights
):
    """The operator ``fastrnn::<cell>_products``."""
    D, _, P = h0.shape
    dgx = reference.input_gradients(cell, dgates)
    dx = sum(dgx[d] @ w_ih[d] for d in range(D)) if inputs else None
    if not weights:
        return dx, None, None, None, None
    sequence = Sequence(batch_first, batch_sizes, lengths, reset)
    dga = reference.recurrent_gradients(cell, dgates)
    before = [previous_rows(y[:, d * P : (d + 1) * P], h0[d], sequence, d) for d in range(D)]
    dw_ih = torch.stack([dgx[d].T @ x for d in range(D)])
    dw_hh = torch.stack([dga[d].T @ before[d] for d in range(D)])
    return dx, dw_ih, dw_hh, dgx.sum(1), dga.sum(1)


# ---- What the layers call ----------------------------------------------------------------------------


def previous_rows(y: Tensor, h0: Tensor, sequence: Sequence, direction: int) -> Tensor:
    """h_{t-1} of every row: y [N, P] one step later, h0 [B, P] where a row begins, zero after a reset."""
    batch_first, batch_sizes, lengths, reset = sequence
    B, N = h0.shape[0], y.shape[0]
    if B == 0:
        return y
    if batch_sizes is not None:
        before = torch.cat((h0, y))[_previous_index(batch_sizes, B, N, direction).to(y.device)]
    else:
        dim = 1 if batch_first else 0
        steps = y.unflatten(0, (B, -1) if batch_first else (-1, B))
        T = steps.shape[dim]
        if direction == 0:
            parts = (h0.unsqueeze(dim), steps.narrow(dim, 0, T - 1))
        else:
            parts = (steps.narrow(dim, 1, T - 1), h0.unsqueeze(dim))
        shifted = torch.cat(parts, dim)
        if direction == 1 and lengths is not None:
            last = torch.arange(T).unsqueeze(1 - dim) == (lengths - 1).unsqueeze(dim)
            shifted = torch.where(last.unsqueeze(-1).to(y.device), h0.unsqueeze(dim), shifted)
        before = shifted.flatten(0, 1)
    return before if reset is None else torch.where(reset.unsqueeze(1), torch.zeros_like(before), before)


def _previous_index(batch_sizes: Tensor, B: int, N: int, direction: int) -> Tensor:
    """For each packed row, where its previous one lies in (h0, y)."""
    T = batch_sizes.shape[0]
    first = batch_sizes.cumsum(0) - batch_sizes
    t, b = packed_places(batch_sizes, N)
    before = t - 1 if direction == 0 else t + 1
    inside = before.clamp(0, T - 1)
    exists = (before == inside) & (b < batch_sizes[inside])
    return torch.where(exists, B + first[inside] + b, b)


def packed_places(batch_sizes: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """The step of each packed row and its place in that step, both [N]."""
    first = batch_sizes.cumsum(0) - batch_sizes
    t = torch.repeat_interleave(torch.arange(len(batch_sizes)), batch_sizes, output_size=N)
    return t, torch.arange(N) - first[t]


class Weights(NamedTuple):
    """The parameters of one layer, for each of its D directions."""

    w_ih: Tensors  # [G*H, I]
    w_hh: Tensors  # [G*H, P]
    b_ih: Tensors = ()  # [G*H], or none
    b_hh: Tensors = ()  # [G*H], or none
    w_hr: Tensors = ()  # [P, H], or none


def scan(
    name: str,
    x: Tensor,
    h0: Tensor,
    c0: Maybe,
    weights: Weights,
    sequence: Sequence,
    all_c: bool = False,
    listener: Callable[[Tensor, Tensor], Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer: (y [N, D*P], h_n [D, B, P], c_n [D, B, H], every c [D, N, H] if all_c).

    x [N, I]; h0 [D, B, P]; c0 [D, B, H] for cells that have one, else None. ``listener`` is called with the
    complete dL/dh_t [D, N, P] and dL/dc_t [D, N, H] (without c: [0]) of every row at each back-propagation.
    """
    if c0 is h0 and c0 is not None:
        c0 = c0.view_as(c0)  # torch.compile takes no tensor twice
    tensors = (x, h0, c0, *(t for part in weights for t in part))
    options = (sequence.batch_sizes, sequence.lengths, sequence.reset)
    needed = _is_dual() or _needs_function(tensors)
    packed = _prepack.find(weights, needed) if _prepack.packs and not _is_traced() else None
    if needed:
        y, h_n, c_n, _, c = _scan_function().apply(
            name, sequence.batch_first, len(weights.b_ih) > 0, len(weights.w_hr) > 0, *options, *tensors
        )
        if listener is not None and y.grad_fn is not None:
            y.grad_fn.listener = listener  # the ctx of Scan.backward
    elif packed is not None:
        y, h_n, c_n, _, c = _PACKED[name](x, h0, c0, packed, *options, sequence.batch_first, all_c)
    else:
        y, h_n, c_n, _, c = _FORWARD[name](x, h0, c0, *weights, *options, sequence.batch_first, all_c)
    return y, h_n, c_n, c


def _is_dual() -> bool:
    """Whether forward-mode derivatives are being taken."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def _scan_function() -> type[Scan]:
    if _is_dual():
        return DualScan
    return Scan if _is_traced() else EagerScan


def _backward_function() -> type[ScanBackward]:
    return DualScanBackward if _is_dual() else ScanBackward


def _needs_function(tensors: tuple) -> bool:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    return _is_traced() and not torch.compiler.is_compiling()


def _is_traced() -> bool:
    """Whether torch.compile, torch.export or a transform of torch.func looks on."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
