"""``fastrnn.prepack``: weights in the form that the kernels stream, kept between calls, for serving.

A pack belongs to the weights of one layer and lives as long as a module that it was made for. A call finds it
by the weights it computes with, and uses it while each of them is the tensor that was packed, at the same
address, with the same strides and version.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from . import _operators
from ._warn import warn

_Module = TypeVar("_Module", bound=nn.Module)
Weights = Sequence[Tensor | None]  # of one layer, as the operators take them
_CHANGED = "the weights have changed"
# Of prepack's argument, the name that the operator pack has for it.
_STORAGE = {None: "", torch.bfloat16: "bfloat16", torch.int8: "int8"}


class State(NamedTuple):
    """Identity and version of a packed tensor: a later call compares them with those of its own weight."""

    # The tensor's __dict__ stands for the tensor, because swap_tensors refuses tensors with a second or a
    # weak reference. While it is held no other tensor gets it, and swap_tensors exchanges it with the data.
    attributes: dict
    address: int
    strides: tuple[int, ...]
    version: int | None  # None for an inference tensor, which has no version counter
    storage: torch.UntypedStorage  # held, so that no other memory gets this address

    @staticmethod
    def of(t: Tensor) -> "State":
        version = None if t.is_inference() else t._version
        return State(t.__dict__, t.data_ptr(), t.stride(), version, t.untyped_storage())

    def is_that_of(self, t: Tensor) -> bool:
        return (
            t.__dict__ is self.attributes
            and t.data_ptr() == self.address
            and t.stride() == self.strides
            and (self.version is None or t._version == self.version)
        )


@dataclass(eq=False)
class Pack:
    packed: Tensor | None  # None: undone
    note: str  # for explain()
    states: list[State]
    storage: str  # of the weights, as the operator pack names it

    def serves(self, weights: Weights) -> bool:
        states = self.states  # another thread may undo it meanwhile
        return len(states) > 0 and all(
            state.is_that_of(t) for state, t in zip(states, _tensors(weights), strict=True)
        )

    def undo(self, reason: str) -> None:
        self.packed, self.states = None, []
        self.note = f"no longer prepacked: {reason}"


packs: WeakValueDictionary[tuple[int, ...], Pack] = WeakValueDictionary()  # by the ids of the weights
_owners = WeakIdKeyDictionary()  # module -> its Packs. Not in the module: pickles and copies would hold them


def _tensors(weights: Weights) -> list[Tensor]:
    """Those that users hold: instead of u, which each call joins, the vectors that it is joined from."""
    return [v for t in weights if t is not None for v in getattr(t, "joined", (t,))]


def _key(weights: Weights) -> tuple[int, ...]:
    return tuple(map(id, _tensors(weights)))


def _make(cell: str, weights: Weights, storage: str) -> Pack:
    with torch.no_grad():
        packed = torch.ops.fastrnn.pack(cell, *_operators.given(weights), storage)
    note = "prepacked" + (storage and f" as {storage}")
    return Pack(packed, note, [State.of(t) for t in _tensors(weights)], storage)


def has_pack(weights: Weights) -> bool:
    return _key(weights) in packs


def find(weights: Weights, for_gradients: bool) -> Tensor | None:
    """The pack of these weights, or None. A call that needs gradients undoes the pack, and so does a change
    of the weights."""
    pack = packs.get(_key(weights))
    if pack is None or (packed := pack.packed) is None or torch.jit.is_tracing():
        return None
    if not for_gradients and pack.serves(weights):
        return packed
    reason = "a call needed gradients" if for_gradients else _CHANGED
    pack.undo(reason)
    warn(f"prepack() is undone, because {reason}")
    return None


def in_int8(weights: Weights) -> bool:
    """Whether a call without gradients reads these weights as int8."""
    pack = packs.get(_key(weights))
    return pack is not None and pack.storage == "int8" and pack.serves(weights)


def note(weights: Weights) -> str:
    """The state of a layer's pack in explain()'s words; empty if there was never one."""
    pack = packs.get(_key(weights))
    if pack is None:
        return ""
    stale = pack.packed is not None and not pack.serves(weights)
    return f", no longer prepacked: {_CHANGED}" if stale else f", {pack.note}"


def undo(module: nn.Module, reason: str) -> None:
    """Undoes the packs of one module, if it has any."""
    for pack in _owners.get(module, ()):
        pack.undo(reason)


def drop(module: nn.Module) -> None:
    """Forgets the packs of a module whose class changes."""
    _owners.pop(module, None)


def _recurrent_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, child) for name, child in module.named_modules() if hasattr(child, "_scan_layers"))


def _check(name: str, module: nn.Module, weights: torch.dtype | None) -> None:
    if module.training:
        raise RuntimeError(f"prepack is for inference: {name} is in training mode, call eval() first")
    own = {id(t) for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))}
    for _, layer in module._scan_layers():  # type: ignore[operator]
        for t in _tensors(layer):
            if id(t) not in own:
                raise ValueError(
                    f"prepack: a weight of {name} is computed at each call (parametrized, or heads)"
                )
            if not t.is_cpu or t.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"prepack serves float32 and float64 on the CPU, {name} has {t.dtype} on {t.device}"
                )
            if weights is not None and t.dtype != torch.float32:
                raise ValueError(f"weights={weights} is for float32 modules, {name} has {t.dtype}")


def prepack(module: _Module, weights: torch.dtype | None = None) -> _Module:
    """Keeps packed weights of every fastrnn module inside ``module`` between calls; returns ``module``.

    For serving: call ``eval()`` first and run under ``torch.no_grad()`` or ``inference_mode()``. Calls of few
    rows a step and some 30 in all gain most; shorter ones do not pack without it, and gain nothing.
    ``weights=torch.bfloat16`` rounds the weights (not the biases) to bfloat16, half the bytes to read, which
    also helps single steps from 256 units on; sums and states stay float32. ``weights=torch.int8`` rounds the
    weights of each unit of a gate to 255 levels, a quarter of the bytes, and at every step each row of x and
    h as well, for products of 8-bit numbers; biases, gates and states stay float32. NaN or infinity in a row
    of x or h makes every unit of that row NaN; in the weights of a unit it makes that unit NaN in every row.
    docs/serving.md has the errors and the speed.

    Undone for a module by ``train()``, and with a warning by a call that needs gradients and by the first
    call after its weights changed: edited in place, loaded, moved, or exchanged by ``swap_tensors``. torch
    counts no change for edits through ``p.data``, a NumPy view, another tensor or process that shares the
    memory alone, torch's fused optimizers, and any edit of weights made under ``inference_mode()``: the old
    weights stay in effect until ``prepack`` is called again.

    The module itself is as before: ``state_dict``, pickles and copies know nothing of packs, and several
    threads may call it. A pack serves the very weights it was made from: others (assigned later, or of
    ``functional_call``) do not use it, and modules that share all weights of a layer share its pack.
    ``explain`` says what is prepacked. A module without packs reads its weights in place where all steps
    together have few rows, and packs them in each call otherwise: there the results with packs are the same
    to the bit, with few rows to rounding. torch.compile, torch.export and torch.jit take no notice of packs.

    Raises RuntimeError for a module in training mode, and ValueError where there is nothing to prepack: no
    fastrnn module, parametrized weights, other ``weights``, or a device or dtype without these kernels.
    """
    if weights not in _STORAGE:
        raise ValueError(f"weights must be None, torch.bfloat16 or torch.int8, got {weights}")
    found = list(_recurrent_modules(module))
    if not found:
        raise ValueError("prepack: no fastrnn module inside")
    for name, child in found:
        _check(name or type(child).__name__, child, weights)
    made: dict[tuple[int, ...], Pack] = {}
    for _, child in found:
        layers = child._scan_layers()  # type: ignore[operator]
        for cell, layer in layers:
            if (key := _key(layer)) not in made:
                made[key] = _make(cell, layer, _STORAGE[weights])
        _owners[child] = [made[_key(layer)] for _, layer in layers]
    packs.update(made)
    return module
