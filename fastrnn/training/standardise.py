"""Values in their own units, and the same values with mean 0 and standard deviation 1 for the network."""

from typing import Any

import torch
from torch import Tensor, nn

ROUNDING = 4 * torch.finfo(torch.float64).eps


def mean_and_scale(values: Tensor) -> dict[str, list[float]]:
    """The mean and the scale of each column of values [N, I], in float64.

    The scale is the standard deviation. A column that is constant but for rounding has the scale 1:
    it is centred only, so that a later change of 0.1 stays a change of 0.1.
    """
    values = values.double()
    largest = values.abs().amax(0)
    constant = values.amax(0) - values.amin(0) <= ROUNDING * largest
    mean = torch.where(constant, values[0], values.mean(0))
    apart = values - mean
    unit = torch.where(constant, 1.0, apart.abs().amax(0))  # squares of 1e-200 would be zero
    scale = unit * ((apart / unit).square().sum(0) / max(1, len(values) - 1)).sqrt()
    return {"mean": mean.tolist(), "scale": torch.where(constant, 1.0, scale).tolist()}


class Standardise(nn.Module):
    """(x - mean) / scale, and back.

    Mean and scale stay float64 whatever the precision of the model that this is a part of: float32
    cannot tell a time stamp of today from one a minute later.

    Args:
        spec: ``{"mean": [I floats], "scale": [I floats]}``.
    """

    mean: Tensor  # [I]
    scale: Tensor  # [I]

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        for name in ("mean", "scale"):
            values = torch.tensor(spec[name], dtype=torch.float64)
            self.register_buffer(name, values, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "Standardise":
        mean, scale = self.mean, self.scale
        super()._apply(fn, recurse)
        self.mean, self.scale = mean.to(self.mean.device), scale.to(self.scale.device)
        return self

    def forward(self, values: Tensor, origin: Tensor | None = None) -> Tensor:
        """float64 [..., I]; ``origin`` stands in for the mean."""
        return (values.double() - (self.mean if origin is None else origin)) / self.scale

    def undo(self, values: Tensor, origin: Tensor | None = None) -> Tensor:
        """Values in their own units, float64 [..., I]."""
        return values.double() * self.scale + (self.mean if origin is None else origin)
