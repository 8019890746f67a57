"""A layer that keeps little for its way back: ``memory="recompute"``.

Training keeps x and the states before every k-th step. Back-propagation goes through the segments of k steps
from the last to the first, scans each once more, now with what its gradients need, and forgets it. The
gradients are those of a layer that stores everything; derivatives of these are taken of the whole sequence.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _autograd
from ._operators import Maybe
from .reference import SLOTS
from .rows import Rows, put, take
from .step_options import StepOptions

__all__ = ["layer"]

Result = tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]  # (y, the last states, the history)


def layer(
    run: Callable[..., Result],
    memory: str | int,
    x: Tensor,
    states: Sequence[Tensor],
    weights: _autograd.Weights,
    rows: Rows,
    keep_history: bool,
    composed: bool,
    listener: _autograd.Listener | None,
    options: StepOptions,
) -> Result:
    """``run``, functional.layer of one cell, on the arguments after ``memory``, which is k or "recompute"."""
    to = [rows.of_states(t) for t in options.reset_to or ()]  # [N, D, *]
    keeps = _autograd._needs_function((x, *states, *weights, *to))
    k = rows.T
    if keeps and not (_autograd._is_traced() or _autograd._is_dual()):
        k = default_k(rows.T) if isinstance(memory, str) else min(memory, rows.T)
    if k == rows.T:
        return run(x, states, weights, rows, keep_history, composed, listener, options)
    (D, *_), S, seen = states[0].shape, len(states), {}
    results: list[tuple[Tensor, ...]] = []

    def complete_in(d: int, gradients: list[Tensor]) -> None:
        seen[d] = gradients
        if listener is not None and len(seen) == D:
            listener([torch.cat(of_state) for of_state in zip(*(seen[d] for d in range(D)), strict=True)])
            seen.clear()

    for d in range(D):
        tell = None if listener is None else partial(complete_in, d)
        direction = Direction(run, rows, d, k, S, keep_history, composed, tell, options)
        own = x, *(t[d : d + 1] for t in states), *weights[d * SLOTS : (d + 1) * SLOTS]
        results.append(Recomputed.apply(direction, *own, *(t[:, d : d + 1] for t in to)))
    if D == 1:
        y, *others = results[0]
    else:
        ys, *parts = zip(*results, strict=True)
        y, others = torch.cat(ys, 1), [torch.cat(of_directions) for of_directions in parts]
    return y, others[:S], others[S:]


def default_k(T: int) -> int:
    """4 sqrt(T) steps in segments of one length. With sqrt(T) the states and a segment together take least,
    but many short scans take longer: 1.7 times ``store`` instead of 1.4 at T=200, B=32, H=128."""
    return -(-T // max(round(T**0.5 / 4), 1))


class Direction(NamedTuple):
    """One direction of a layer. Its tensors are x [N, I], the initial states [1, B, *], the weights, and the
    states of a reset as rows [N, 1, *]; its results in a row y, the last states, and where it is kept the
    history."""

    run: Callable[..., Result]
    rows: Rows
    number: int
    k: int
    states: int  # how many
    keep_history: bool
    composed: bool
    listener: _autograd.Listener | None
    options: StepOptions

    def inputs(self, tensors: Sequence, states: Sequence[Tensor], rows: Rows, where) -> list:
        """The tensors of a segment, from the states [1, B, *] before it."""
        S, end = self.states, 1 + self.states + SLOTS
        own = [state[:, : rows.B] for state in states]
        x, *to = (take(t, where) for t in (tensors[0], *tensors[end:]))
        return [x, *own, *tensors[1 + S : end], *to]

    def scan(self, inputs: Sequence, rows: Rows, where, listener=None) -> list[Tensor]:
        S, end = self.states, 1 + self.states + SLOTS
        options = self.options.segment(self.number, where, rows.B)
        if to := inputs[end:]:
            options = options._replace(reset_to=tuple(map(rows.states, to)))
        x, states, weights = inputs[0], inputs[1 : 1 + S], inputs[1 + S : end]
        keep = self.keep_history
        y, last, history = self.run(x, states, weights, rows, keep, self.composed, listener, options)
        return [y, *last, *(history if keep else ())]

    def after(self, own: Sequence[Tensor], before: Sequence[Tensor]) -> Sequence[Tensor]:
        """The states of all rows after a segment, or their gradients before it: of a packed sequence fewer
        and fewer rows take part in one."""
        n = own[0].shape[1]
        if n == self.rows.B:
            return own
        return [torch.cat((new, old[:, n:]), 1) for new, old in zip(own, before, strict=True)]


class Recomputed(torch.autograd.Function):
    """The results of a Direction on its tensors."""

    @staticmethod
    def forward(ctx: Any, direction: Direction, *tensors: Any):  # type: ignore[override]
        S, x = direction.states, tensors[0]
        now: Sequence[Tensor] = tensors[1 : 1 + S]
        pieces = direction.rows.segments(direction.k, direction.number, x.device)
        starts = [t.new_empty(len(pieces), *t.shape[1:]) for t in now]  # the states before each segment
        y = now[0].new_empty(len(x), now[0].shape[2])
        history = [t.new_empty(1, len(x), t.shape[2]) for t in now[1:] if direction.keep_history]
        for i, (rows, where) in enumerate(pieces):
            for start, state in zip(starts, now, strict=True):
                start[i] = state[0]
            found = direction.scan(direction.inputs(tensors, now, rows, where), rows, where)
            put(y, where, found[0])
            for whole, part in zip(history, found[1 + S :], strict=True):
                put(whole[0], where, part[0])
            now = direction.after(found[1 : 1 + S], now)
        ctx.direction = direction
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *starts)
        return y, *now, *history

    @staticmethod
    @_autograd._one_by_one_in_legacy_vmap
    def backward(ctx: Any, *gradients: Maybe):  # type: ignore[override]
        S = ctx.direction.states
        tensors, starts = ctx.saved_tensors[:-S], ctx.saved_tensors[-S:]
        with _autograd._without_autocast(tensors[0]):
            return None, *_gradients(ctx.direction, ctx.needs_input_grad[1:], tensors, starts, gradients)


def _gradients(direction: Direction, wanted, tensors, starts, gradients) -> list[Maybe]:
    S, k, x = direction.states, direction.k, tensors[0]
    again = torch.is_grad_enabled()  # the gradients are to be derived in turn: by one scan of the whole
    if again:
        k, starts = direction.rows.T, tensors[1 : 1 + S]
    of_rows = [j == 0 or j > S + SLOTS for j in range(len(tensors))]  # x and the states of a reset
    sums = [
        None if not want else torch.empty_like(t) if by_row else torch.zeros_like(t)
        for t, want, by_row in zip(tensors, wanted, of_rows, strict=True)
    ]
    passes = [want or 1 <= j <= S for j, want in enumerate(wanted)]  # those of the states join segments
    dy, dlast, dhistory = gradients[0], gradients[1 : 1 + S], gradients[1 + S :]
    dstates: Sequence = [
        torch.zeros_like(t) if g is None else g for t, g in zip(tensors[1:], dlast, strict=False)
    ]
    complete = [t.new_empty(1, len(x), t.shape[2]) for t in starts if direction.listener]

    def keep_complete(where, found: list[Tensor]) -> None:
        for whole, part in zip(complete, found, strict=True):
            put(whole[0], where, part[0])

    for i, (rows, where) in reversed(list(enumerate(direction.rows.segments(k, direction.number, x.device)))):
        inputs = direction.inputs(tensors, [start[i : i + 1] for start in starts], rows, where)
        for j in range(len(inputs)):
            if passes[j]:  # as a tensor of its own: the same one may be given twice
                inputs[j] = inputs[j].view_as(inputs[j]) if again else inputs[j].detach().requires_grad_()
        with torch.enable_grad():
            listener = partial(keep_complete, where) if complete else None
            results = direction.scan(inputs, rows, where, listener)
        given = [None if dy is None else take(dy, where), *(g[:, : rows.B] for g in dstates)]
        given += [None if g is None else take(g[0], where).unsqueeze(0) for g in dhistory]
        there = [j for j, g in enumerate(given) if g is not None]
        by = [t for t, passed in zip(inputs, passes, strict=True) if passed]
        outputs, given = [results[j] for j in there], [given[j] for j in there]
        found = iter(torch.autograd.grad(outputs, by, given, create_graph=again, materialize_grads=True))
        parts: list[Any] = [next(found) if passed else None for passed in passes]
        dstates = direction.after(parts[1 : 1 + S], dstates)
        for j, (total, part) in enumerate(zip(sums, parts, strict=True)):
            if total is not None and of_rows[j]:
                put(total, where, part)
            elif j > S and total is not None:
                total.add_(part)
    if direction.listener is not None:
        direction.listener(complete)
    sums[1 : 1 + S] = dstates
    return [total if want else None for total, want in zip(sums, wanted, strict=True)]
