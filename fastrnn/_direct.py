"""Ordinary calls on the CPU past torch's dispatcher, a whole stack of layers in one call of csrc/direct.

A call through torch.ops takes some 25 us besides its kernels, and one step of a small layer 2 us. Here a call
of a module either is plain (float32 or float64, dense, contiguous, no option, and nothing that wants to see
torch's operators: no transform, trace, mode, autocast or profiler), or None is returned and the caller goes
by way of the operators, which also check and raise. Both run the same kernels.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd import profiler as profiling

from . import _C, _autograd, _prepack, functional

_HERE = _C.begin(Tensor, nn.Parameter)  # DLPack's exchange API: torch has it from 2.10 on


class Form(NamedTuple):
    """What a call is, besides its tensors x [T, B, I] or [B, T, I], states and weights. One step of a cell is
    a call of one layer over x [B, I]."""

    cell: str
    states: int  # how many are given: all, or none
    layers: int
    directions: int
    batch_first: bool


def is_plain() -> bool:
    """Whether nothing but the kernels has to see a call. torch.compile must meet its question first."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._is_any_autocast_enabled()
        or forward_ad._current_level >= 0
        or profiling._is_profiler_enabled
        or not _HERE
    )


def run(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    layers: int = 1,
    directions: int = 1,
    batch_first: bool = False,
) -> tuple[Tensor, ...] | None:
    """y and the last states, of a step the states alone; or None for a call that is not plain. No states are
    zeros. weights: torch's, one layer and direction after the other."""
    if not is_plain():
        return None
    differentiable, packs = torch.is_grad_enabled(), None
    if _prepack.packs:
        each = len(weights) // layers
        of_layers = [weights[k : k + each] for k in range(0, len(weights), each)]
        if differentiable and any(map(_prepack.has_pack, of_layers)):
            return None
        packs = [_prepack.find(of_layer, False) for of_layer in of_layers]
    # What saved-tensor hooks get is theirs, and may be read-only: Scan saves copies for them.
    if differentiable and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return None
    found = _C.forward(cell, x, states, weights, layers, directions, batch_first, differentiable, packs)
    if found is None:
        return None
    S = functional.CELLS[cell].states
    count = S if x.dim() == 2 else 1 + S
    if not found[0]:
        return found[1:]
    form = Form(cell, len(states), layers, directions, batch_first)
    return Direct.apply(form, found[1 : 1 + count], found[1 + count :], x, *states, *weights)


class Direct(torch.autograd.Function):
    """The results of a call, with their gradients. Further derivatives, and what csrc/direct does not serve,
    follow from one more call by way of the operators."""

    @staticmethod
    def forward(ctx: Any, form: Form, outputs: tuple, kept: tuple, *tensors: Tensor):  # type: ignore[override]
        ctx.form, ctx.kept = form, len(kept)
        # torch.nn's outputs may be changed in place before backward. So an alias is held, whose version says
        # whether that has happened.
        ctx.y, ctx.version = outputs[0].detach(), outputs[0]._version
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, *tensors)
        return outputs

    @staticmethod
    @_autograd._one_by_one_in_legacy_vmap
    def backward(ctx: Any, *gradients: Tensor | None):  # type: ignore[override]
        form: Form = ctx.form
        cell, count, layers, directions, batch_first = form
        saved, y, wanted = ctx.saved_tensors, ctx.y, ctx.needs_input_grad[3:]
        kept, tensors = saved[: ctx.kept], saved[ctx.kept :]
        nothing = (None, None, None)
        if torch.is_grad_enabled() or _autograd._is_traced():
            return nothing + _by_operators(form, tensors, gradients, wanted)
        x, states, weights = tensors[0], tensors[1 : 1 + count], tensors[1 + count :]
        if y._version != ctx.version:
            # Computed once more in this rare case alone; a copy of y would cost memory in every call.
            y, *kept = _forward_again(form, tensors)
        over = len(kept) > 0 and _autograd._is_last_use(kept[-1])
        gradients = tuple(g if g is None or g.is_contiguous() else g.contiguous() for g in gradients)
        stack = cell, x, states, weights, layers, directions, batch_first
        found = _C.backward(*stack, y, kept, gradients, over, wanted)
        if over:
            ctx.y = None
            if functional.CELLS[cell].reuses_saved:
                torch.autograd.graph.increment_version(kept)
        return nothing + (_by_operators(form, tensors, gradients, wanted) if found is None else found)


def _forward_again(form: Form, tensors: Sequence[Tensor]) -> list[Tensor]:
    """y, and what a call has kept."""
    cell, count, layers, directions, batch_first = form
    x, states, weights = tensors[0], tensors[1 : 1 + count], tensors[1 + count :]
    found = _C.forward(cell, x, states, weights, layers, directions, batch_first, True, None)
    assert found is not None  # it was served before
    S = functional.CELLS[cell].states
    return [found[1], *found[1 + (S if x.dim() == 2 else 1 + S) :]]


def _by_operators(
    form: Form, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The wanted gradients, as a differentiable function of ``tensors`` and ``gradients``."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad(), _autograd._without_autocast(tensors[0]):
        # Aliases: one of the tensors may itself be made from another one.
        aliases = [t.view_as(t) for t in tensors]
        outputs = _outputs_by_operators(form, aliases)
        there = [k for k, g in enumerate(gradients) if g is not None]
        inputs = [t for t, want in zip(aliases, wanted, strict=True) if want]
        outputs, given = [outputs[k] for k in there], [gradients[k] for k in there]
        found = iter(
            torch.autograd.grad(outputs, inputs, given, create_graph=differentiable, allow_unused=True)
        )
    return tuple(next(found) if want else None for want in wanted)


def _outputs_by_operators(form: Form, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    cell, count, layers, directions, batch_first = form
    x, states, weights = tensors[0], tensors[1 : 1 + count], tensors[1 + count :]
    S, each = functional.CELLS[cell].states, len(weights) // (layers * directions)
    if not states:
        B = x.shape[0 if batch_first or x.dim() == 2 else 1]
        shape = (B,) if x.dim() == 2 else (layers * directions, B)
        states = [x.new_zeros(*shape, weights[1].shape[1])] * S
    hx: Any = states if S > 1 else states[0]
    if x.dim() == 2:
        results = functional._cell(cell, x, hx, *weights, *[None] * (4 - each))  # type: ignore[arg-type]
        return results if S > 1 else (results,)
    options = each > 2, layers, 0.0, False, directions == 2, batch_first
    return functional._recurrent(cell, (x, hx, weights, *options))
