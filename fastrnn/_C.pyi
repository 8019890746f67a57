"""The compiled part. Importing it registers ``torch.ops.fastrnn``; its functions are those of csrc/direct."""

from collections.abc import Sequence

from torch import Tensor

def begin(tensor: type, parameter: type, /) -> bool: ...
def forward(
    cell: str, x: Tensor, states: Sequence[Tensor] | None, weights: Sequence[Tensor | None], layers: int,
    directions: int, batch_first: bool, differentiable: bool, packs: Sequence[Tensor | None] | None, /,
) -> tuple | None: ...  # fmt: skip
def backward(
    cell: str, x: Tensor, states: Sequence[Tensor] | None, weights: Sequence[Tensor | None], layers: int,
    directions: int, batch_first: bool, y: Tensor, kept: Sequence[Tensor],
    gradients: Sequence[Tensor | None], over: bool, wanted: Sequence[bool], /,
) -> tuple[Tensor | None, ...] | None: ...  # fmt: skip
