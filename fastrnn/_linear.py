"""The linear scan h_t = a_t * h_{t-1} + b_t as a differentiable function of rows.

It has two forms (csrc/linear/linear.h), and the adjoint of each is the other one, run the other way. So one
function, whose backward calls itself, has derivatives of every order.
"""

from typing import Any

import torch
from torch import Tensor

from . import _autograd, _operators, _vmap
from .rows import Rows

__all__ = ["composed", "scan"]


class LinearScan(torch.autograd.Function):
    """(h [N, H], last [B, H]) of a, b [N, H], h0 [B, H], the rows' batch_sizes, lengths and reset, and
    batch_first, reverse and shifted."""

    @staticmethod
    def forward(*arguments):
        return _operators.linear_scan(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        a, _, h0, *rows = inputs[:6]
        ctx.form = inputs[6:]
        ctx.save_for_backward(a, h0, output[0], *rows)

    @staticmethod
    @_autograd._one_by_one_in_legacy_vmap
    def backward(ctx: Any, dh: Tensor, dlast: Tensor):  # type: ignore[override]
        a, h0, h, *options = ctx.saved_tensors
        batch_first, reverse, shifted = ctx.form
        rows = Rows.of(a.shape[0], h0.shape[0], batch_first, *options)
        db, dh0 = scan(a, dh, dlast, rows, not reverse, not shifted)
        da = None
        if ctx.needs_input_grad[0]:
            # a_t multiplies a state of one scan on its way to the next step, and meets a gradient there.
            if shifted:
                da = rows.previous(db, dlast, int(not reverse)) * h
            else:
                da = db * rows.previous(h, h0, int(reverse))
        return da, db, dh0, *(None,) * 6

    @staticmethod
    def vmap(info, in_dims, *arguments):
        function, V = _function(), info.batch_size
        if arguments[3] is not None:  # packed
            return _vmap.one_by_one(function, V, (), arguments, in_dims)
        *tensors, batch_first, reverse, shifted = arguments
        a, b, h0, _, lengths, reset = (
            _vmap._front(t, d, V) for t, d in zip(tensors, in_dims[:6], strict=True)
        )
        B = h0.shape[1]
        a, b, reset = (_vmap._fold_rows(t, B, batch_first) for t in (a, b, reset))
        lengths = _vmap._fold_lengths(lengths)
        h, last = function.apply(a, b, h0.flatten(0, 1), None, lengths, reset, batch_first, reverse, shifted)
        return (_vmap._unfold_rows(h, V, B, batch_first), last.unflatten(0, (V, B))), (0, 0)


class DualLinearScan(LinearScan):
    """LinearScan with a forward-mode derivative. A class of its own, because torch.compile refuses Functions
    that have one."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        LinearScan.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:6])

    @staticmethod
    @_autograd._one_by_one_in_legacy_vmap
    @_autograd._forward_mode_on
    def jvp(ctx: Any, *tangents):
        tensors = _autograd._primals(ctx.saved_tensors)
        moving = _autograd._present(tangents[:3])

        def function(*given):
            return DualLinearScan.apply(*_autograd._replaced(tensors, moving, given), *ctx.form)

        at, along = ([of[i] for i in moving] for of in (tensors, tangents))
        return _autograd._push_forward(function, at, along)


def _function() -> type[LinearScan]:
    return DualLinearScan if _autograd._is_dual() else LinearScan


def scan(
    a: Tensor, b: Tensor, h0: Tensor, rows: Rows, reverse: bool, shifted: bool = False
) -> tuple[Tensor, Tensor]:
    """By the kernels: (h [N, H], last [B, H])."""
    arguments = (
        a, b, h0, rows.batch_sizes, rows.lengths, rows.reset, rows.batch_first, reverse, shifted,
    )  # fmt: skip
    if _autograd._is_dual() or _autograd._needs_function((a, b, h0)):
        return _function().apply(*arguments)
    return _operators.linear_scan(*arguments)


def composed(a: Tensor, b: Tensor, h0: Tensor, rows: Rows, reverse: bool) -> tuple[Tensor, Tensor]:
    """From torch operations, step by step: (h [N, H], last [B, H])."""
    places, order = rows.steps(), rows.order
    m = h0[order]
    every: list[Any] = [None] * rows.T
    for t in range(rows.T - 1, -1, -1) if reverse else range(rows.T):
        n = len(places[t])
        every[t] = rows.keep(places[t], a[places[t]] * m[:n]) + b[places[t]]
        m = torch.cat((every[t], m[n:]))
    return rows.assemble(every), m[torch.argsort(order)]
