"""What acts on the states between the steps of a scan: masks, clips, and the states of a reset.

Masks are drawn by torch, once a layer and call, before the scan. ``StepOptions`` has the formulas; the
operators take what it holds (csrc/common/operators.h). ``B`` batch, ``D`` directions, ``H`` hidden size,
``N`` rows, ``P`` width of h, ``T`` time.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .rows import Rows, Where, take

__all__ = ["NAMES", "NO_OPTIONS", "StepOptions", "acting", "draw", "masked_input"]

NAMES = (
    "zoneout", "recurrent_dropout", "variational_dropout", "cell_clip", "state_gradient_clip", "reverse",
    "memory",
)  # fmt: skip


class StepOptions(NamedTuple):
    """Of one layer in one call. Rows of masks lie as those of x.

    A step from the states before it, h and c, takes place in this order:
    1. Where ``reset`` says so, the states become those of ``reset_to``.
    2. a = W_hh (recurrent * h) + b_hh; h itself stays unmasked.
    3. The cell's step, with candidate * g in place of g, and c clipped to [-cell_clip, cell_clip] after its
       update, before h is computed from it; then the projection of h.
    4. Zoneout, for h and c each: keep * (the state after 1) + (1 - keep) * (the state after 3).
    5. The states after 4 are those of the step: the next one starts from them, y and h_n, c_n are made of
       them, and in back-propagation their complete gradients are clipped to [-v, v]; those of the initial
       states are not. An LSTM's h_t depends on c_t, and dL/dc_t has that part; where zoneout acts on c, h_t
       depends on the c after 3 alone, and dL/dc_t has no such part. Where gradients are differentiated
       again, what reaches the states through the gradients and what reaches them through the outputs is
       clipped apart.
    """

    # Of h and c: in training bool [D, N, *], true where a unit keeps its state; in evaluation p; None: off.
    zoneout: tuple[Tensor | float | None, ...] = (None, None)
    candidate: Tensor | None = None  # [D, N, H], 0 or 1 / (1 - p)
    recurrent: Tensor | None = None  # [D, B, P], 0 or 1 / (1 - p)
    cell_clip: float | None = None
    state_gradient_clip: float | None = None
    reset_to: tuple[Tensor, ...] | None = None  # for each state [T, D, B, *], or the same at every step
    happens: Tensor | None = None  # bool [N]: the rows that are no padding, in place of lengths

    def at(self, direction: int, t: int, rows: Tensor, batch: Tensor) -> "StepOptions":
        """Of one step of one direction: its rows, whose batch indices are ``batch``, without T and D."""

        def of(masks: Any, index: Tensor):
            return masks[direction][index] if isinstance(masks, Tensor) else masks

        return self._replace(
            zoneout=tuple(of(keep, rows) for keep in self.zoneout),
            candidate=of(self.candidate, rows),
            recurrent=of(self.recurrent, batch),
            reset_to=self.reset_to
            and tuple((to[t] if to.dim() == 4 else to)[direction][batch] for to in self.reset_to),
            happens=None if self.happens is None else self.happens[rows].unsqueeze(1),
        )

    def segment(self, direction: int, where: Where, B: int) -> "StepOptions":
        """Of some steps of one direction: their rows, the first of which are B. Without reset_to."""

        def of(masks: Any):
            return take(masks[direction], where).unsqueeze(0) if isinstance(masks, Tensor) else masks

        recurrent = None if self.recurrent is None else self.recurrent[direction : direction + 1, :B]
        zoneout, candidate = tuple(map(of, self.zoneout)), of(self.candidate)
        return self._replace(zoneout=zoneout, candidate=candidate, recurrent=recurrent, reset_to=None)

    def in_float32(self) -> "StepOptions":
        """With factors and states of a reset in float32."""
        if self is NO_OPTIONS:
            return self

        def of(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.float()

        to = self.reset_to and tuple(t.float() for t in self.reset_to)
        return self._replace(candidate=of(self.candidate), recurrent=of(self.recurrent), reset_to=to)

    # ---- As the operators take them

    @property
    def masks(self) -> tuple[Tensor | None, ...]:
        """Those of zoneout, of the candidate and of h, if there are any."""
        keeps = (keep if isinstance(keep, Tensor) else None for keep in self.zoneout)
        return (*keeps, self.candidate, self.recurrent)

    @property
    def numbers(self) -> tuple[float, ...] | None:
        """Zoneout of h and of c, 1 with masks, and the clips; 0: off. None: no option acts."""
        zoneout = (1.0 if isinstance(keep, Tensor) else keep or 0.0 for keep in self.zoneout)
        numbers = (*zoneout, self.cell_clip or 0.0, self.state_gradient_clip or 0.0)
        others = self.candidate, self.recurrent, self.reset_to
        return numbers if any(numbers) or any(t is not None for t in others) else None

    @classmethod
    def of(cls, numbers: Sequence[float], masks: Sequence[Tensor | None], reset_to) -> "StepOptions":
        """From numbers and masks, and reset_to or Nones."""
        *keeps, candidate, recurrent = masks
        *shares, cell_clip, gradient_clip = numbers
        zoneout = tuple(p or None if keep is None else keep for keep, p in zip(keeps, shares, strict=True))
        to = None if reset_to[0] is None else tuple(reset_to)
        return cls(zoneout, candidate, recurrent, cell_clip or None, gradient_clip or None, to)

    # ---- Of one step

    def masked(self, h: Tensor) -> Tensor:
        """h as it goes into its product with W_hh."""
        return h if self.recurrent is None else self.recurrent * h

    def inside(self, states: int) -> dict[str, Callable[[Tensor], Tensor]]:
        """What acts inside the step of a cell with so many states, by the name that the step has for it."""
        found: dict[str, Callable[[Tensor], Tensor]] = {}
        if (mask := self.candidate) is not None:
            found["candidate"] = lambda g: mask * g
        clips_gradient = self.state_gradient_clip is not None and self.zoneout[1] is None
        if states > 1 and (self.cell_clip is not None or clips_gradient):
            found["updated"] = self._updated
        return found

    def _updated(self, c: Tensor) -> Tensor:
        if self.cell_clip is not None:
            c = c.clamp(-self.cell_clip, self.cell_clip)
        return c if self.zoneout[1] is not None else self._clipped_in_back_propagation(c)

    def after(self, before: Sequence[Tensor], updated: Sequence[Tensor]) -> list[Tensor]:
        """The states after the step."""
        states = list(updated)
        for i, (old, new, keep) in enumerate(zip(before, updated, self.zoneout, strict=False)):
            if isinstance(keep, Tensor):
                states[i] = torch.where(keep, old, new)
            elif keep is not None:
                states[i] = keep * old + (1 - keep) * new
            if i == 0 or keep is not None:
                states[i] = self._clipped_in_back_propagation(states[i])
        return states

    def _clipped_in_back_propagation(self, state: Tensor) -> Tensor:
        if self.state_gradient_clip is None:
            return state
        function = ClipGradient if torch.compiler.is_compiling() else DualClipGradient
        return function.apply(state, self.state_gradient_clip)


NO_OPTIONS = StepOptions()


class ClipGradient(torch.autograd.Function):
    """The identity, whose gradient is clipped to [-v, v], as by torch's hook of a tensor.

    The derivative of a clipped gradient is that of the clip. Back-propagation through it passes the states
    once more and is clipped there too; forward mode is exact."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, v: float) -> Tensor:  # type: ignore[override]
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.v = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):  # type: ignore[override]
        return gradient.clamp(-ctx.v, ctx.v), None


class DualClipGradient(ClipGradient):
    """ClipGradient with a forward-mode derivative, the identity's. torch.compile refuses Functions that have
    one."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:  # type: ignore[override]
        return tangent.clone()


# ---- From the options of a module ----------------------------------------------------------------------


def pair(value: float | tuple[float, float]) -> tuple[float, float]:
    return value if isinstance(value, tuple) else (value, value)


def acting(options: Mapping[str, Any], train: bool, gradients: bool) -> list[str]:
    """The names of those that act on the states in a call in training or not, with gradients or without."""
    acts = {
        "zoneout": True,
        "recurrent_dropout": train,
        "variational_dropout": train and pair(options.get("variational_dropout", 0.0))[1] > 0,
        "cell_clip": True,
        "state_gradient_clip": gradients,
    }
    return [name for name in options if acts.get(name)]


def draw(
    options: Mapping[str, Any], train: bool, rows: Rows, N: int, states: Sequence[Tensor]
) -> StepOptions:
    """For one layer of N rows with states [D, B, *], without reset_to. The masks are drawn in the order in
    which ``StepOptions`` has them, that of h first."""
    like = states[0]
    D, B, P = like.shape
    H = states[-1].shape[2]
    share = options.get("zoneout", 0.0)
    keeps = [
        (_of_rows(like, p, N, width, rows, torch.bool) if train else p) if p > 0 else None
        for p, width in zip(pair(share)[: len(states)], (P, H), strict=False)
    ]
    p = options.get("recurrent_dropout", 0.0)
    candidate = _of_rows(like, p, N, H, rows, like.dtype) if train and p > 0 else None
    p = pair(options.get("variational_dropout", 0.0))[1]
    recurrent = torch.dropout(like.new_ones(D, B, P), p, True) if train and p > 0 else None
    return StepOptions(
        (*keeps, None)[:2], candidate, recurrent, options.get("cell_clip"), options.get("state_gradient_clip")
    )


def _of_rows(like: Tensor, p: float, N: int, width: int, rows: Rows, dtype: torch.dtype) -> Tensor:
    """Dropout of ones [D, N, width]; with dtype bool, where it has zeros. Dense ones are drawn time-major, so
    that a seed gives the same ones for batch_first."""
    D = like.shape[0]
    if rows.batch_sizes is not None:
        return _dropped_ones(like, p, (D, N, width), dtype)
    ones = _dropped_ones(like, p, (D, rows.T, rows.B, width), dtype)
    return (ones.transpose(1, 2) if rows.batch_first else ones).flatten(1, 2)


def _dropped_ones(like: Tensor, p: float, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if like.is_cpu and not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
        # The same numbers from the same state of the generator as torch.dropout, in half its time.
        kept = torch.empty(shape, dtype=dtype, device=like.device).bernoulli_(1 - p)
        return kept.logical_not_() if dtype is torch.bool else kept.div_(1 - p)
    dropped = torch.dropout(like.new_ones(shape), p, True)
    return dropped == 0 if dtype is torch.bool else dropped


def masked_input(x: Tensor, p: float, rows: Rows) -> Tensor:
    """x [N, I] with one mask [B, I] for all steps: variational dropout of the input."""
    mask = torch.dropout(x.new_ones(rows.B, x.shape[1]), p, True)
    if rows.batch_sizes is not None:
        return x * mask[rows.places()[1].to(x.device)]
    return (rows.dense(x) * mask.unsqueeze(1 if rows.batch_first else 0)).flatten(0, 1)
