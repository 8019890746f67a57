"""What torch.nn has not, as a user would write it in torch: the rivals of ``MinGRU``."""

import torch
from torch import Tensor, nn


class MinGRU(nn.Module):
    """One layer in one direction: the gates of all steps at once, then a loop over time."""

    def __init__(self, input_size: int, hidden_size: int, *_: int, dtype: torch.dtype, **__) -> None:
        super().__init__()
        self.weight_ih_l0 = nn.Parameter(torch.randn(2 * hidden_size, input_size, dtype=dtype) * 0.1)
        self.bias_ih_l0 = nn.Parameter(torch.zeros(2 * hidden_size, dtype=dtype))

    def forward(self, x: Tensor, h_0: Tensor) -> tuple[Tensor, Tensor]:  # x [T, B, I], h_0 [1, B, H]
        z, c = nn.functional.linear(x, self.weight_ih_l0, self.bias_ih_l0).chunk(2, -1)
        z = z.sigmoid()
        a, b, h, steps = 1 - z, z * c, h_0[0], []
        for a_t, b_t in zip(a.unbind(), b.unbind(), strict=True):
            h = a_t * h + b_t
            steps.append(h)
        return torch.stack(steps), h[None]


LOOPS = {"MinGRU": MinGRU}
