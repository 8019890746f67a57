"""``fastrnn.prepack``: weights in the form that the kernels stream, kept between calls, for serving.

A pack belongs to the weights of one layer. It is found by the identity of W_hh and used while every weight is
the same tensor at the same address and version; it goes when they change, and with them when they die.
"""

import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

_Module = TypeVar("_Module", bound=nn.Module)
Weights = Sequence[Sequence[Tensor]]  # w_ih, w_hh, b_ih, b_hh, w_hr of all directions of one layer


@dataclass
class Pack:
    packed: Tensor | None  # None: undone
    note: str  # for explain()
    states: list[tuple]
    # Their memory cannot become anybody else's, so that an address says whose it is.
    aliases: list[Tensor]
    owner: weakref.ref

    def undo(self, reason: str) -> None:
        self.packed, self.aliases = None, []
        self.note = f"no longer prepacked: {reason}"


packs: dict[int, Pack] = {}  # by id(w_hh[0])


def _state(t: Tensor) -> tuple:
    return id(t), t.data_ptr(), 0 if t.is_inference() else t._version


def _states(weights: Weights) -> list[tuple]:
    return [_state(t) for part in weights for t in part]


def keep(weights: Weights, packed: Tensor, note: str) -> None:
    first = weights[1][0]
    key = id(first)
    owner = weakref.ref(first, lambda _: packs.pop(key, None))
    aliases = [t.detach() for part in weights for t in part]
    packs[key] = Pack(packed, note, _states(weights), aliases, owner)


def find(weights: Weights, for_gradients: bool) -> Tensor | None:
    """The pack of these very weights, if there is one and it is not stale; a call that needs gradients and
    weights that have changed undo it."""
    pack = packs.get(id(weights[1][0]))
    if pack is None or pack.packed is None or torch.jit.is_tracing():
        return None
    packed, states = pack.packed, _states(weights)
    if for_gradients:
        reason = "a call needed gradients"
    elif states == pack.states:
        return packed
    elif [s[0] for s in states] != [s[0] for s in pack.states]:
        return None  # another call's weights: functional_call, or a tied W_hh
    else:
        reason = "the weights have changed"
    pack.undo(reason)
    warnings.warn(f"fastrnn: prepack() is undone, because {reason}", stacklevel=2)
    return None


def note(weights: Weights) -> str:
    """What explain() says of a layer's pack, or nothing."""
    pack = packs.get(id(weights[1][0]))
    return "" if pack is None else f", {pack.note}"


def undo(module: nn.Module, reason: str) -> None:
    """Undoes the packs of one fastrnn module."""
    for _, weights in module._scan_layers() if packs else ():  # type: ignore[operator]
        if (pack := packs.get(id(weights[1][0]))) is not None:
            pack.undo(reason)


def _recurrent_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, child) for name, child in module.named_modules() if hasattr(child, "_scan_layers"))


def _check(name: str, module: nn.Module, weights: torch.dtype | None) -> None:
    if module.training:
        raise RuntimeError(f"prepack is for inference: {name} is in training mode, call eval() first")
    own = {id(p) for p in module.parameters(recurse=False)}
    for _, layer in module._scan_layers():  # type: ignore[operator]
        for t in (t for part in layer for t in part):
            if id(t) not in own:
                raise ValueError(f"prepack: a weight of {name} is computed at each call (parametrized)")
            if not t.is_cpu or t.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"prepack serves float32 and float64 on the CPU, {name} has {t.dtype} on {t.device}"
                )
            if weights is not None and t.dtype != torch.float32:
                raise ValueError(f"weights={weights} is for float32 modules, {name} has {t.dtype}")


def prepack(module: _Module, weights: torch.dtype | None = None) -> _Module:
    """Keeps packed weights of every fastrnn module inside ``module`` between calls; returns ``module``.

    For serving: call ``eval()`` first and run under ``torch.no_grad()`` or ``inference_mode()``. Few rows and
    single steps gain most, because they read each weight once a step. ``weights=torch.bfloat16`` also rounds
    the weights (not the biases) to bfloat16, half the bytes to read; sums and states stay float32.

    Undone for a module by ``train()``, and with a warning by a call that needs gradients and by the first
    call after its weights changed: assigned, loaded, moved, or edited in place. Not seen, so that the old
    weights stay in effect until ``prepack`` is called again: edits in place through ``p.data``, a NumPy view
    or another process's view of shared memory, and those of a module made under ``inference_mode()``.

    The module itself is as before: ``state_dict``, pickles and copies know nothing of packs, other weights
    (``functional_call``) do not use them, and several threads may call it. ``explain`` says what is
    prepacked. Results are those of the module to the bit where it packs its weights in each call, which it
    does unless there are few rows in all steps together, and to rounding there. torch.compile, torch.export
    and torch.jit take no notice of packs.

    Raises RuntimeError for a module in training mode, and ValueError where there is nothing to prepack: no
    fastrnn module, parametrized weights, or a device or dtype without these kernels.
    """
    if weights not in (None, torch.bfloat16):
        raise ValueError(f"weights must be None or torch.bfloat16, got {weights}")
    found = list(_recurrent_modules(module))
    if not found:
        raise ValueError("prepack: no fastrnn module inside")
    for name, child in found:
        _check(name or type(child).__name__, child, weights)
    for _, child in found:
        for cell, layer in child._scan_layers():  # type: ignore[operator]
            with torch.no_grad():
                pack = getattr(torch.ops.fastrnn, f"{cell}_pack").default
                keep(
                    layer,
                    pack(*layer, weights is not None),
                    "prepacked" + (" as bfloat16" if weights else ""),
                )
    return module
