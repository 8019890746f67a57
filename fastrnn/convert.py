"""Whole models between torch.nn and fastrnn: the same parameters, another class."""

from typing import TypeVar

from torch import nn

from . import _prepack, modules

__all__ = ["convert", "to_torch"]

_Model = TypeVar("_Model", bound=nn.Module)
_TO_FASTRNN: dict[type, type] = {getattr(nn, name): getattr(modules, name) for name in modules.__all__}
_TO_TORCH = {ours: theirs for theirs, ours in _TO_FASTRNN.items()}


def _change_classes(model: _Model, table: dict[type, type]) -> _Model:
    for module in model.modules():
        # Exactly these classes: a user's subclass has a forward of its own.
        if type(module) in table:
            _prepack.drop(module)
            module.__class__ = table[type(module)]
    return model


def convert(model: _Model) -> _Model:
    """Turns every torch.nn.LSTM, GRU, RNN and cell inside ``model`` into fastrnn's, in place; returns it.

    Parameters, buffers, hooks and the training flag stay the very same objects, so an optimizer that holds
    the parameters goes on working. Subclasses of torch.nn's modules, parametrized ones among them, are left
    alone.
    """
    return _change_classes(model, _TO_FASTRNN)


def to_torch(model: _Model) -> _Model:
    """Undoes convert(): every fastrnn module inside ``model`` becomes torch.nn's, in place; returns it."""
    return _change_classes(model, _TO_TORCH)
