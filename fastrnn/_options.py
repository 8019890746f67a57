"""The options of the modules that torch.nn's do not have, one row each.

Which module takes which option its constructor says. A row says what else the option needs: vectors of
parameters, a cell of its own in the table of cells, an initialisation.
"""

from collections.abc import Callable
from math import isfinite
from typing import Any, NamedTuple

from torch import nn

from . import init


class Option(NamedTuple):
    off: Any  # the default
    checked: Callable[[str, Any, nn.Module], Any]  # (name, value, module) -> the value, or raises
    cell: str = ""  # what it appends to the name of the module's cell in reference.CELLS
    vectors: dict[str, dict[str, int]] = {}  # noqa: RUF012  of a cell {name: k}: [k*H], in the order of u
    initialise: Callable[[nn.Module, Any], object] | None = None  # after torch's own initialisation
    only_initialises: bool = False  # the module computes what torch.nn's computes


def _flag(name: str, value: Any, module: nn.Module) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
    if value and module.hidden_size == 0:
        raise ValueError(f"{name}=True needs hidden_size > 0, got 0")
    return value


def _probability(name: str, value: Any, module: nn.Module) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
        raise ValueError(f"{name} should be a number in range [0, 1), got {value!r}")
    return float(value)


def _bias(name: str, value: Any, module: nn.Module) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not isfinite(value):
        raise ValueError(f"{name} should be None or a finite number, got {value!r}")
    if not module.bias:
        raise ValueError(f"{name}={value} needs biases, got bias=False")
    return float(value)


OPTIONS = {
    "peephole": Option(
        False,
        _flag,
        cell="_peephole",
        vectors={"lstm": {"weight_ci": 1, "weight_cf": 1, "weight_co": 1}},
    ),
    "coupled": Option(False, _flag, cell="_coupled"),
    "weight_dropout": Option(0.0, _probability),
    "forget_bias": Option(None, _bias, initialise=init.forget_bias_, only_initialises=True),
}


def on(module: nn.Module, values: dict[str, Any]) -> dict[str, Any]:
    """Those of a constructor's options that are not off, checked, in the order of the table."""
    checked = {name: OPTIONS[name].checked(name, values[name], module) for name in OPTIONS if name in values}
    given = {name: value for name, value in checked.items() if value != OPTIONS[name].off}
    cells = [f"{name}={value}" for name, value in given.items() if OPTIONS[name].cell]
    if len(cells) > 1:
        raise ValueError(f"{' and '.join(cells)} cannot be combined")
    return given


def cell_name(cell: str, options: dict[str, Any]) -> str:
    """Of torch.nn's cell with these options, in reference.CELLS and in functional."""
    return cell + "".join(OPTIONS[name].cell for name in options)


def vectors(cell: str, options: dict[str, Any]) -> dict[str, int]:
    """{name: k}: the parameters [k*H] that the options bring."""
    return {vector: k for name in options for vector, k in OPTIONS[name].vectors.get(cell, {}).items()}


def beyond_torch(options: dict[str, Any]) -> dict[str, Any]:
    """Those with which a module computes something else than torch.nn's."""
    return {name: value for name, value in options.items() if not OPTIONS[name].only_initialises}


def text(options: dict[str, Any]) -> str:
    """As in a module's repr."""
    return ", ".join(f"{name}={value}" for name, value in options.items())
