"""Rules of torch.func.vmap for a scan and its gradients: the mapped dimension V becomes a part of the batch.

Each helper takes or gives tensors with V first.
"""

from typing import Any

import torch
from torch import Tensor

from . import _autograd, _operators
from ._operators import Maybe
from .reference import SLOTS, W_HR


def scan(function, V: int, form, tensors: tuple, dims: tuple):
    """``function`` (a Scan) of V scans: (outputs, their dimensions)."""
    S = form.cell.states
    if form.numbers is not None or tensors[0] is not None or any(d is not None for d in dims[4 + S :]):
        return one_by_one(function, V, form, tensors, dims)
    _, lengths, reset, x, *rest = tensors
    lengths, reset, x = (_front(t, d, V) for t, d in zip((lengths, reset, x), dims[1:4], strict=True))
    states = [_front(t, d, V) for t, d in zip(rest[:S], dims[4 : 4 + S], strict=True)]
    B, batch_first = states[0].shape[2], form.batch_first
    y, *results = function.apply(
        *form, None, _fold_lengths(lengths), _fold_rows(reset, B, batch_first), _fold_rows(x, B, batch_first),
        *map(_fold_state, states), *rest[S:],
    )  # fmt: skip
    last = [_unfold_state(t, V) for t in results[:S]]
    kept = [_unfold_saved(t, V, B, batch_first) for t in results[S:]]
    outputs = (_unfold_rows(y, V, B, batch_first), *last, *kept)
    return outputs, (0,) * len(outputs)


def gradients(form, V: int, wanted: tuple, grouped: tuple, dims: tuple) -> tuple[Tensor, ...]:
    """ScanGrad [V, *] of V scans with the same weights: one backward scan of all, and products for each."""
    mapped_groups = (
        [_front(t, d, V) for t, d in zip(*pair, strict=True)]
        for pair in zip(grouped[:3], dims[:3], strict=True)
    )
    (_, lengths, reset), (y, *kept), (dy, *dothers) = mapped_groups
    cell, S = form.cell, form.cell.states
    x, *states = (_front(t, d, V) for t, d in zip(grouped[3][: 1 + S], dims[3][: 1 + S], strict=True))
    given = _operators.given(grouped[3][1 + S :])
    B, batch_first = states[0].shape[2], form.batch_first

    def fold(t):
        return _fold_saved(t, B, batch_first)

    kept = [fold(t) for t in kept]
    history, saved = kept[: S - 1], kept[S - 1] if cell.saved else None
    dgates, dstates, complete, _ = _operators.scan_backward(
        form.name, _fold_rows(dy, B, batch_first), [_fold_state(t) for t in dothers[:S]],
        [fold(t) for t in dothers[S:]],
        _fold_rows(y, B, batch_first), history, saved, [_fold_state(t) for t in states], *given, None,
        _fold_lengths(lengths), _fold_rows(reset, B, batch_first), batch_first, False,
    )  # fmt: skip
    dgates = _unfold_saved(dgates, V, B, batch_first)

    def products(dgates, x, y, h0, lengths, reset):
        rows = (None, lengths, reset, batch_first)
        return _operators.composed_weight_gradients(form.name, dgates, x, y, [h0], *given, *rows, True, True)

    mapped = (dgates, x, y, states[0], lengths, reset)
    in_dims = tuple(None if t is None else 0 for t in mapped)
    dx, dweights = torch.func.vmap(products, in_dims=in_dims)(*mapped)
    dw_hr: list[Tensor] = []
    if any(wanted[1 + S :][W_HR::SLOTS]):
        dh, hidden = (
            _unfold_saved(t, V, B, batch_first) for t in (complete[0], cell.hidden(saved, *history))
        )
        dw_hr = list((dh.mT @ hidden).unbind(1))
    dstates = [_unfold_state(t, V) for t in dstates]
    return tuple(_autograd.chosen(cell, wanted, dx, dstates, dweights, dw_hr, []))


def one_by_one(function, V: int, options: tuple, args: tuple, dims: tuple):
    """Mapped weights, packed sequences and options: one call each."""
    results = [
        function.apply(
            *options, *(a if d is None else a.select(d, v) for a, d in zip(args, dims, strict=True))
        )
        for v in range(V)
    ]
    outputs = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return outputs, (0,) * len(outputs)


def _front(t: Any, dim: int | None, V: int) -> Any:
    if t is None:
        return None
    return t.expand(V, *t.shape) if dim is None else t.movedim(dim, 0)


def _fold_lengths(t: Maybe) -> Maybe:  # [V, B] -> [V*B]
    return None if t is None else t.flatten()


def _fold_state(t: Maybe) -> Maybe:  # [V, D, B, *] -> [D, V*B, *]
    return None if t is None else t.movedim(0, 1).flatten(1, 2)


def _unfold_state(t: Tensor, V: int) -> Tensor:
    return t.unflatten(1, (V, t.shape[1] // V)).movedim(1, 0)


def _fold_rows(t: Maybe, B: int, batch_first: bool) -> Maybe:  # [V, N, *] -> [V*N, *]
    if t is None or batch_first or B == 0:
        return None if t is None else t.flatten(0, 1)
    return t.unflatten(1, (-1, B)).movedim(0, 1).flatten(0, 2)


def _unfold_rows(t: Tensor, V: int, B: int, batch_first: bool) -> Tensor:
    if batch_first or B == 0:
        return t.unflatten(0, (V, t.shape[0] // V))
    return t.unflatten(0, (-1, V, B)).movedim(1, 0).flatten(1, 2)


def _fold_saved(t: Maybe, B: int, batch_first: bool) -> Maybe:  # [V, D, N, *] -> [D, V*N, *]
    if t is None:
        return None
    return torch.stack([_fold_rows(t[:, d], B, batch_first) for d in range(t.shape[1])])  # type: ignore[misc]


def _unfold_saved(t: Tensor, V: int, B: int, batch_first: bool) -> Tensor:
    return torch.stack([_unfold_rows(one, V, B, batch_first) for one in t], 1)
