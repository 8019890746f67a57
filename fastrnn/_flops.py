"""FLOP formulas of the operators for ``torch.utils.flop_counter``: the matrix products, two FLOPs a
multiply-add, as torch counts those of torch.nn. A formula sees shapes alone, so that steps beyond ``lengths``
count too."""

from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import _C  # noqa: F401  (registers the operators)
from .reference import CELLS

Shape = tuple[int, ...]


def _register(name: str) -> None:
    operators, cell = torch.ops.fastrnn, CELLS[name]

    def rows(x: Shape, h0: Shape, c0: Shape | None) -> tuple[int, int, int, int]:
        """D * N, the width of the gates, P and the width of what is projected (0: nothing is)."""
        D, _, P = h0
        H = P if c0 is None else c0[2]
        return D * x[0], cell.gates * H, P, H if H != P else 0

    def scan(x: Shape, h0: Shape, c0: Shape | None, *_: Any, **__: Any) -> int:
        N, GH, P, projected = rows(x, h0, c0)
        return 2 * N * (GH * (x[1] + P) + P * projected)

    def back(*arguments: Any, **_: Any) -> int:
        y, h0, c0 = arguments[6:9]
        N, GH, P, projected = rows(y, h0, c0)
        return 2 * N * P * (GH + projected)

    def products(
        dgates: Shape, x: Shape, y: Shape, h0: Shape, w_ih: list[Shape], *arguments: Any, **_: Any
    ) -> int:
        inputs, weights = arguments[-2:]
        GH, I = w_ih[0]
        return 2 * h0[0] * x[0] * GH * (I * (inputs + weights) + h0[2] * weights)

    register_flop_formula([getattr(operators, name), getattr(operators, f"{name}_packed")])(scan)
    register_flop_formula(getattr(operators, f"{name}_backward"))(back)
    if cell.in_place:
        register_flop_formula(getattr(operators, f"{name}_backward_in_place"))(back)
    register_flop_formula(getattr(operators, f"{name}_products"))(products)


for _name in CELLS:
    _register(_name)
