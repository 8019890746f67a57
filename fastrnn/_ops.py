"""The operators as differentiable functions: one autograd Function a scan, registered from the table of cells.

Only the recurrence is an operator. The products with the input and the gradients of all weights are ordinary
torch operations around it, so that autograd, vmap and torch.compile treat them natively.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _C, reference  # noqa: F401  (_C registers the operators)
from .reference import CELLS, Layout

Maybe = Tensor | None

# ---- Fake kernels: the shapes of the results ---------------------------------------------------------


def _register_fakes(name: str) -> None:
    cell = CELLS[name]

    @torch.library.register_fake(f"fastrnn::{name}")
    def _(gx, h0, c0, w_hh, b_hh, w_hr, batch_sizes, batch_first, save):
        D, B, P = h0.shape
        N, H = gx[0].shape[0], w_hh[0].shape[0] // cell.gates
        return (
            h0.new_empty(N, D * P),
            h0.new_empty(D, B, P),
            h0.new_empty(D, B, H) if cell.has_c else h0.new_empty(0),
            h0.new_empty(D, N, cell.saved * H) if save else h0.new_empty(0),
            h0.new_empty(D, N, H) if save and cell.has_c else h0.new_empty(0),
        )

    @torch.library.register_fake(f"fastrnn::{name}_backward")
    def _(
        dy, dh_n, dc_n, dsaved, dsaved_c, saved, saved_c, y, h0, c0, w_hh, w_hr, batch_sizes, batch_first
    ):
        D, B, P = h0.shape
        N, H = y.shape[0], w_hh[0].shape[0] // cell.gates
        return (
            h0.new_empty(D, N, cell.gradients * H),
            h0.new_empty(D, B, P),
            h0.new_empty(D, B, H) if cell.has_c else h0.new_empty(0),
            h0.new_empty(D, N, P) if w_hr else h0.new_empty(0),
        )


for _name in CELLS:
    _register_fakes(_name)


# ---- Autograd ----------------------------------------------------------------------------------------
# Functions take tensors one by one: `weights` is gx, w_hh, b_hh, w_hr of every direction, one after the other.


def _split(tensors: tuple, D: int, bias: bool, projected: bool) -> tuple[list, list, list, list]:
    lists, i = [], 0
    for present in (True, True, bias, projected):
        lists.append(list(tensors[i : i + D]) if present else [])
        i += D if present else 0
    return lists[0], lists[1], lists[2], lists[3]


def _layout(rows: Tensor, h0: Tensor, batch_sizes: Maybe, batch_first: bool) -> Layout:
    sizes = None if batch_sizes is None else batch_sizes.tolist()
    return Layout(rows.shape[0], h0.shape[1], batch_first, sizes)


class Scan(torch.autograd.Function):
    """(y, h_n, c_n, saved, saved_c) of one layer. The saved activations are outputs, and differentiable: this
    is how the second derivative finds its way back through them."""

    @staticmethod
    def forward(name, batch_first, bias, projected, h0, c0, batch_sizes, *tensors):
        gx, w_hh, b_hh, w_hr = _split(tensors, h0.shape[0], bias, projected)
        op = getattr(torch.ops.fastrnn, name)
        return op(gx, h0, c0, w_hh, b_hh, w_hr, batch_sizes, batch_first, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        name, batch_first, bias, projected, h0, c0, batch_sizes, *tensors = inputs
        y, _, _, saved, saved_c = output
        D = h0.shape[0]
        ctx.options = name, batch_first, bias, projected, D
        ctx.set_materialize_grads(False)
        _, w_hh, _, w_hr = _split(tuple(tensors), D, bias, projected)
        ctx.save_for_backward(saved, saved_c, y, h0, c0, batch_sizes, *w_hh, *w_hr)

    @staticmethod
    def backward(ctx: Any, dy, dh_n, dc_n, dsaved, dsaved_c):  # type: ignore[override]
        name, batch_first, bias, projected, D = ctx.options
        cell = CELLS[name]
        saved, saved_c, y, h0, c0, batch_sizes, *weights = ctx.saved_tensors
        if not cell.has_c:
            dc_n = dsaved_c = None
        if not cell.saved:
            dsaved = None
        arguments = (
            name, batch_first, projected, dy, dh_n, dc_n, dsaved, dsaved_c, saved, saved_c, y, h0, c0,
            batch_sizes, *weights,
        )  # fmt: skip
        function = ScanBackward.apply if _needs_function(arguments[3:]) else ScanBackward.forward
        dgates, dh0, dc0, dh = function(*arguments)
        needs = ctx.needs_input_grad[7:]
        needs_gx, needs_w, needs_b, needs_r = _split(needs, D, bias, projected)
        d_gx, d_w, d_b, d_r = [], [], [], []
        P = h0.shape[2]
        for d in range(D):
            dg = dgates[d]
            recurrent = dg[:, : cell.gates * (dg.shape[1] // cell.gradients)]
            d_gx.append(reference.input_gradients(cell, dg) if needs_gx[d] else None)
            gradient = None
            if needs_w[d]:
                before = previous_rows(y[:, d * P : (d + 1) * P], h0[d], batch_sizes, batch_first, d)
                gradient = reference.unrotate(cell, recurrent.T @ before, 0)
            d_w.append(gradient)
            if bias:
                d_b.append(reference.unrotate(cell, recurrent.sum(0), 0) if needs_b[d] else None)
            if projected:
                H = saved_c.shape[2]
                m = saved[d][:, 3 * H :] * torch.tanh(saved_c[d])
                d_r.append(dh[d].T @ m if needs_r[d] else None)
        return (
            None, None, None, None, dh0, dc0 if cell.has_c else None, None, *d_gx, *d_w, *d_b, *d_r,
        )  # fmt: skip

    @staticmethod
    def vmap(info, in_dims, name, batch_first, bias, projected, h0, c0, batch_sizes, *tensors):
        V, D = info.batch_size, (h0.shape[1] if in_dims[4] == 0 else h0.shape[0])
        args = (h0, c0, batch_sizes, *tensors)
        dims = in_dims[4:]
        if batch_sizes is not None or any(d is not None for d in dims[3 + D :]):
            options = (name, batch_first, bias, projected)
            return _one_by_one(Scan, V, options, args, dims)
        # Shared weights: the mapped dimension is a part of the batch.
        h0, c0, *gx = (_front(a, d, V) for a, d in zip((h0, c0, *tensors[:D]), (*dims[:2], *dims[3 : 3 + D]), strict=True))  # noqa: E501  # fmt: skip
        B = h0.shape[2]
        y, h_n, c_n, saved, saved_c = Scan.apply(
            name, batch_first, bias, projected, _fold_state(h0), _fold_state(c0), None,
            *(_fold_rows(g, B, batch_first) for g in gx), *tensors[D:],
        )  # fmt: skip
        outputs = (
            _unfold_rows(y, V, B, batch_first),
            _unfold_state(h_n, V),
            _unfold_state(c_n, V),
            _unfold_saved(saved, V, B, batch_first),
            _unfold_saved(saved_c, V, B, batch_first),
        )
        return outputs, tuple(0 if o.dim() > 1 else None for o in outputs)


class ScanBackward(torch.autograd.Function):
    """(dgates, dh0, dc0, dh) of one layer; its own derivative is that of the reference."""

    @staticmethod
    def forward(
        name, batch_first, projected, dy, dh_n, dc_n, dsaved, dsaved_c, saved, saved_c, y, h0, c0,
        batch_sizes, *weights,
    ):  # fmt: skip
        w_hh, w_hr = weights[: h0.shape[0]], weights[h0.shape[0] :]
        op = getattr(torch.ops.fastrnn, name + "_backward")
        return op(
            dy, dh_n, dc_n, dsaved, dsaved_c, saved, saved_c, y, h0, c0, w_hh, w_hr, batch_sizes,
            batch_first,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.options = inputs[:3]
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):  # type: ignore[override]
        name, batch_first, _ = ctx.options
        tensors = ctx.saved_tensors
        batch_sizes = tensors[10]
        D = tensors[8].shape[0]
        wanted = [
            i for i, t in enumerate(tensors) if t is not None and i != 10 and t.numel() > 0
        ]

        def function(*given: Tensor):
            full = list(tensors)
            for i, t in zip(wanted, given, strict=True):
                full[i] = t
            dy, dh_n, dc_n, dsaved, dsaved_c, saved, saved_c, y, h0, c0, _, *weights = full
            layout = _layout(y, h0, batch_sizes, batch_first)
            return reference.backward(
                CELLS[name], layout, dy, dh_n, dc_n, dsaved, dsaved_c, saved, saved_c, y, h0, c0,
                weights[:D], weights[D:],
            )  # fmt: skip

        _, vjp = torch.func.vjp(function, *(tensors[i] for i in wanted))
        result: list[Maybe] = [None] * len(tensors)
        for i, gradient in zip(wanted, vjp(tuple(gradients)), strict=True):
            result[i] = gradient
        return None, None, None, *result

    @staticmethod
    def vmap(info, in_dims, name, batch_first, projected, *args):
        V = info.batch_size
        dims = in_dims[3:]
        if args[10] is not None or any(d is not None for d in dims[11:]):
            return _one_by_one(ScanBackward, V, (name, batch_first, projected), args, dims)
        dy, dh_n, dc_n, dsaved, dsaved_c, saved, saved_c, y, h0, c0 = (
            _front(a, d, V) for a, d in zip(args[:10], dims[:10], strict=True)
        )
        B = h0.shape[2]
        rows = [None if t is None else _fold_rows(t, B, batch_first) for t in (dy, y)]
        saves = [
            None if t is None or t.dim() < 4 else _fold_saved(t, B, batch_first)
            for t in (dsaved, dsaved_c, saved, saved_c)
        ]
        if saves[3] is None:
            saves[3] = saved.new_empty(0)
        dgates, dh0, dc0, dh = ScanBackward.apply(
            name, batch_first, projected, rows[0], _fold_state(dh_n), _fold_state(dc_n), *saves, rows[1],
            _fold_state(h0), _fold_state(c0), None, *args[11:],
        )  # fmt: skip
        outputs = (
            _unfold_saved(dgates, V, B, batch_first),
            _unfold_state(dh0, V),
            _unfold_state(dc0, V),
            _unfold_saved(dh, V, B, batch_first),
        )
        return outputs, tuple(0 if o.dim() > 1 else None for o in outputs)


class DualScan(Scan):
    """Scan with a forward-mode derivative. A class of its own, because torch.compile refuses Functions that
    have one."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        Scan.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[4:])

    @staticmethod
    def jvp(ctx: Any, *tangents):
        name, batch_first, bias, projected, D = ctx.options
        tensors = ctx.saved_tensors
        tangents = tangents[4:]
        moving = [i for i, t in enumerate(tangents) if t is not None]

        def function(*given):
            full = list(tensors)
            for i, t in zip(moving, given, strict=True):
                full[i] = t
            h0, c0, batch_sizes, *rest = full
            gx, w_hh, b_hh, w_hr = _split(tuple(rest), D, bias, projected)
            layout = _layout(gx[0], h0, batch_sizes, batch_first)
            return reference.forward(CELLS[name], layout, gx, h0, c0, w_hh, b_hh, w_hr)

        # J v as the transpose of v -> v^T J: forward mode cannot be nested inside a jvp rule.
        outputs, vjp = torch.func.vjp(function, *(tensors[i] for i in moving))
        _, transpose = torch.func.vjp(vjp, tuple(torch.zeros_like(o) for o in outputs))
        return transpose(tuple(tangents[i] for i in moving))[0]


# ---- Helpers of vmap: the mapped dimension V, always first here, folded into the batch and out again ---


def _front(t: Maybe, dim: int | None, V: int) -> Maybe:
    if t is None:
        return None
    return t.expand(V, *t.shape) if dim is None else t.movedim(dim, 0)


def _one_by_one(function, V: int, options: tuple, args: tuple, dims: tuple):
    """Mapped weights or packed sequences: one call each."""
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


def _fold_rows(t: Tensor, B: int, batch_first: bool) -> Tensor:  # [V, N, *] -> [V*N, *]
    if batch_first:
        return t.flatten(0, 1)
    return t.unflatten(1, (-1, B)).movedim(0, 1).flatten(0, 2)


def _unfold_rows(t: Tensor, V: int, B: int, batch_first: bool) -> Tensor:
    if batch_first:
        return t.unflatten(0, (V, -1))
    return t.unflatten(0, (-1, V, B)).movedim(1, 0).flatten(1, 2)


def _fold_saved(t: Tensor, B: int, batch_first: bool) -> Tensor:  # [V, D, N, *] -> [D, V*N, *]
    return torch.stack([_fold_rows(t[:, d], B, batch_first) for d in range(t.shape[1])])


def _unfold_saved(t: Tensor, V: int, B: int, batch_first: bool) -> Tensor:
    if t.dim() == 1:
        return t
    return torch.stack([_unfold_rows(one, V, B, batch_first) for one in t], 1)


# ---- What the layers call ----------------------------------------------------------------------------


def previous_rows(y: Tensor, h0: Tensor, batch_sizes: Maybe, batch_first: bool, direction: int) -> Tensor:
    """h_{t-1} of every row: y [N, P] one step later, and h0 [B, P] where a row begins."""
    B = h0.shape[0]
    if B == 0:
        return y
    if batch_sizes is not None:
        return torch.cat((h0, y))[_previous_index(batch_sizes, B, y.shape[0], direction)]
    dim = 1 if batch_first else 0
    steps = y.unflatten(0, (B, -1) if batch_first else (-1, B))
    T = steps.shape[dim]
    if direction == 0:
        parts = (h0.unsqueeze(dim), steps.narrow(dim, 0, T - 1))
    else:
        parts = (steps.narrow(dim, 1, T - 1), h0.unsqueeze(dim))
    return torch.cat(parts, dim).flatten(0, 1)


def _previous_index(batch_sizes: Tensor, B: int, N: int, direction: int) -> Tensor:
    """For each packed row, where its previous one lies in (h0, y)."""
    T = batch_sizes.shape[0]
    first = batch_sizes.cumsum(0) - batch_sizes
    t = torch.repeat_interleave(torch.arange(T), batch_sizes, output_size=N)
    b = torch.arange(N) - first[t]
    before = t - 1 if direction == 0 else t + 1
    inside = before.clamp(0, T - 1)
    exists = (before == inside) & (b < batch_sizes[inside])
    return torch.where(exists, B + first[inside] + b, b)


def scan(
    name: str,
    gx: list[Tensor],
    h0: Tensor,
    c0: Maybe,
    w_hh: list[Tensor],
    b_hh: list[Tensor],
    w_hr: list[Tensor],
    batch_sizes: Maybe,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [N, D*P], h_n [D, B, P], c_n [D, B, H]) of one layer, D = 1 or 2 directions.

    gx D x [N, G*H] is the input's part of the gates; h0 [D, B, P]; c0 [D, B, H] or None; w_hh D x [G*H, P];
    b_hh D x [G*H] or empty; w_hr D x [P, H] or empty; batch_sizes int64 [T] for packed rows or None.
    """
    dual = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
    tensors = (*gx, *w_hh, *b_hh, *w_hr)
    if dual or _needs_function((h0, c0, *tensors)):
        function = DualScan if dual else Scan
        return function.apply(name, batch_first, bool(b_hh), bool(w_hr), h0, c0, batch_sizes, *tensors)[:3]
    op = getattr(torch.ops.fastrnn, name)
    return op(gx, h0, c0, w_hh, b_hh, w_hr, batch_sizes, batch_first, False)[:3]


def _needs_function(tensors: tuple) -> bool:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
