"""FLOP formulas of the operators for ``torch.utils.flop_counter``: the matrix products, two FLOPs a
multiply-add, as torch counts those of torch.nn. A formula sees shapes alone, so that steps beyond ``lengths``
count too."""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from .reference import CELLS

Shape = tuple[int, ...]


def _widths(name: str, states: list[Shape]) -> tuple[int, int, int, int]:
    """D, the width of the gates, P and the width of what is projected (0: nothing is)."""
    (D, _, P), H = states[0], states[-1][2]
    return D, CELLS[name].gates * H, P, H if H != P else 0


@register_flop_formula(torch.ops.fastrnn.scan)
def _scan(name: str, x: Shape, states: list[Shape], *_: Any, **__: Any) -> int:
    D, GH, P, projected = _widths(name, states)
    return 2 * D * x[0] * (GH * (x[1] + P) + P * projected)


@register_flop_formula(torch.ops.fastrnn.scan_backward)
def _scan_backward(name: str, dy: Any, dlast: Any, dhistory: Any, y: Shape, *arguments: Any, **_: Any) -> int:
    D, GH, P, projected = _widths(name, arguments[2])
    return 2 * D * y[0] * P * (GH + projected)


@register_flop_formula(torch.ops.fastrnn.weight_gradients)
def _weight_gradients(
    name: str, dgates: Shape, x: Shape, y: Shape, states: list[Shape], *arguments: Any, **_: Any
) -> int:
    D, GH, P, _projected = _widths(name, states)
    inputs, of_weights = arguments[-2:]
    return 2 * D * x[0] * GH * (x[1] * (inputs + of_weights) + P * of_weights)
