"""FLOP formulas of the operators for ``torch.utils.flop_counter``: the matrix products, two FLOPs a
multiply-add, as torch counts those of torch.nn. A formula sees shapes alone, so that steps beyond ``lengths``
count too."""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from .reference import CELLS

Shape = tuple[int, ...]


def _weights(name: str, states: list[Shape], I: int) -> tuple[int, int, int, int]:
    """D, and the numbers of elements of W_ih, W_hh and W_hr, 0 for those that there are not."""
    (D, _, P), H, cell = states[0], states[-1][2], CELLS[name]
    GH = cell.gates * H
    return D, 0 if cell.takes_gates else GH * I, GH * P if cell.dense else 0, H * P if H != P else 0


@register_flop_formula(torch.ops.fastrnn.scan)
def _scan(name: str, x: Shape, states: list[Shape], *_: Any, **__: Any) -> int:
    D, *weights = _weights(name, states, x[1])
    return 2 * D * x[0] * sum(weights)


@register_flop_formula(torch.ops.fastrnn.scan_backward)
def _scan_backward(name: str, dy: Any, dlast: Any, dhistory: Any, y: Shape, *arguments: Any, **_: Any) -> int:
    D, _w_ih, *weights = _weights(name, arguments[2], 0)
    return 2 * D * y[0] * sum(weights)


@register_flop_formula(torch.ops.fastrnn.weight_gradients)
def _weight_gradients(
    name: str, dgates: Shape, x: Shape, y: Shape, states: list[Shape], *arguments: Any, **_: Any
) -> int:
    D, w_ih, w_hh, _w_hr = _weights(name, states, x[1])
    inputs, of_weights = arguments[6:8]
    return 2 * D * x[0] * (w_ih * (inputs + of_weights) + w_hh * of_weights)
