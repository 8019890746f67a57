"""The options of the modules that torch.nn's do not have, one row each.

Which module takes which option its constructor says. A row says what else the option needs: vectors of
parameters, a cell of its own in the table of cells, an initialisation.
"""

from collections.abc import Callable
from math import isfinite
from typing import Any, NamedTuple

from torch import nn

from . import init, reference, step_options


class Option(NamedTuple):
    off: Any  # the default
    checked: Callable[[str, Any, nn.Module], Any]  # (name, value, module) -> the value, or raises
    cell: str = ""  # what it appends to the name of the module's cell in reference.CELLS
    vectors: dict[str, dict[str, int]] = {}  # noqa: RUF012  of a cell {name: k}: [k*H], in the order of u
    initialise: Callable[[nn.Module, Any], object] | None = None  # after torch's own initialisation
    only_initialises: bool = False  # the module computes what torch.nn's computes
    inside: str = ""  # what the cell's step must take for it, by keyword


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


def _probabilities(name: str, value: Any, module: nn.Module) -> float | tuple[float, float]:
    """One for both, or two."""
    if not isinstance(value, (tuple, list)):
        return _probability(name, value, module)
    if len(value) != 2:
        raise ValueError(f"{name} should be a number or two of them, got {value!r}")
    first, second = (_probability(f"{name}[{i}]", p, module) for i, p in enumerate(value))
    return first if first == second else (first, second)


def _zoneout(name: str, value: Any, module: nn.Module) -> float | tuple[float, float]:
    if isinstance(value, (tuple, list)) and not isinstance(module, (nn.LSTM, nn.LSTMCell)):
        raise ValueError(f"{name} should be one number for the one state h, got {value!r}")
    return _probabilities(name, value, module)


def _clip(name: str, value: Any, module: nn.Module) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not (isfinite(value) and value > 0):
        raise ValueError(f"{name} should be None or a finite number above 0, got {value!r}")
    return float(value)


def _heads(name: str, value: Any, module: nn.Module) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} should be an integer of at least 1, got {value!r}")
    H: Any = module.hidden_size
    P: Any = getattr(module, "proj_size", 0)
    if value > 1 and (H == 0 or H % value != 0):
        raise ValueError(f"{name}={value} should divide hidden_size={H}")
    if value > 1 and P > 0:
        raise ValueError(f"{name}={value} cannot be combined with proj_size={P}")
    return value


def _reverse(name: str, value: Any, module: nn.Module) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} should be of type bool, got: {type(value).__name__}")
    if value and module.bidirectional:
        raise ValueError(f"{name}=True is a single direction, it cannot be combined with bidirectional=True")
    return value


def _memory(name: str, value: Any, module: nn.Module) -> str | int:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if (is_number and value > 0) or (isinstance(value, str) and value in ("store", "recompute")):
        return value
    raise ValueError(f"{name} should be 'store', 'recompute' or a number of steps above 0, got {value!r}")


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
    "layer_norm": Option(
        False,
        _flag,
        cell="_layer_norm",
        vectors={
            "lstm": {"gain_ih": 4, "gain_hh": 4, "gain_c": 1, "shift_c": 1},
            "gru": {"gain_ih": 3, "gain_hh": 3},
        },
        initialise=lambda module, _: init.norm_(module),
    ),
    "coupled": Option(False, _flag, cell="_coupled"),
    "weight_dropout": Option(0.0, _probability),
    "zoneout": Option(0.0, _zoneout),
    "recurrent_dropout": Option(0.0, _probability, inside="candidate"),
    "variational_dropout": Option(0.0, _probabilities),
    "cell_clip": Option(None, _clip, inside="updated"),
    "state_gradient_clip": Option(None, _clip, inside="updated"),
    "heads": Option(1, _heads),
    "reverse": Option(False, _reverse),
    "memory": Option("store", _memory),
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


def check_cell(cell: str, options: dict[str, Any], proj_size: Any) -> None:
    """Refuses options that act inside the step of a cell of reference.CELLS that does not take them, and a
    projection of one that has none."""
    of_cell = text({name: value for name, value in options.items() if OPTIONS[name].cell})
    if of_cell and proj_size and reference.CELLS[cell].hidden is None:
        raise ValueError(f"{of_cell} cannot be combined with proj_size={proj_size}")
    taken = {*(reference.CELLS[cell].step.__kwdefaults__ or {})}
    if reference.CELLS[cell].states == 1:
        taken.add("updated")  # h, which is seen after the step
    for name, value in options.items():
        if (inside := OPTIONS[name].inside) and inside not in taken:
            others = [f"{other}={of}" for other, of in options.items() if OPTIONS[other].cell]
            raise ValueError(f"{name}={value} cannot be combined with {' and '.join(others)}")


def on_states(options: dict[str, Any]) -> dict[str, Any]:
    """Those that act on the states between steps."""
    return {name: options[name] for name in step_options.NAMES if name in options}


def vectors(cell: str, options: dict[str, Any]) -> dict[str, int]:
    """{name: k}: the parameters [k*H] that the options bring."""
    return {vector: k for name in options for vector, k in OPTIONS[name].vectors.get(cell, {}).items()}


def beyond_torch(options: dict[str, Any]) -> dict[str, Any]:
    """Those with which a module computes something else than torch.nn's."""
    return {name: value for name, value in options.items() if not OPTIONS[name].only_initialises}


def text(options: dict[str, Any]) -> str:
    """As in a module's repr."""
    return ", ".join(f"{name}={value}" for name, value in options.items())
