"""The one error of bad input, which the command line shows without a traceback, and checks that raise it."""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


class InputError(ValueError):
    """Data, a checkpoint or a setting that cannot be used; the message says what and where."""


def listing(names: Iterable[object], most: int = 10) -> str:
    """Names in a message: the first ones, each cut to a readable length, and how many more there are."""
    found = [" ".join(str(name).split()) for name in names]
    shown = [name if len(name) <= 60 else f"{name[:57]}..." for name in found[:most]]
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(shown) + more


def in_short(error: BaseException) -> str:
    """An error's class and the first sentence of what it says."""
    first = next(filter(None, map(str.strip, str(error).splitlines())), "").partition(". ")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def check_whole(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Refuse a setting that is not a whole number from ``least`` to ``most``."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not (whole and least <= value and (most is None or value <= most)):
        ends = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} must be a whole number {ends}, got {value!r}")


def check_number(name: str, value: Any, interval: str) -> None:
    """Refuse a setting that is not a finite number in an interval such as ``"[0, 1)"``."""
    low, high = map(float, interval[1:-1].split(","))
    inside = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    inside = inside and (low <= value if interval[0] == "[" else low < value)
    if not (inside and (value <= high if interval[-1] == "]" else value < high)):
        raise InputError(f"{name} must be a number in {interval}, got {value!r}")


def check_name(name: str, value: Any, known: Iterable[str]) -> None:
    """Refuse a name that is not one of the known ones."""
    if value not in (names := list(known)):
        raise InputError(f"{name} must be one of {', '.join(names)}, got {value!r}")


def check_held_out(shares: Any) -> None:
    """Refuse shares for validation and test that leave nothing to train on.

    Raises:
        InputError: not two numbers from 0 on, or together 1 or more.
    """
    if not isinstance(shares, (tuple, list)) or len(shares) != 2:
        raise InputError(f"held_out must be two shares, for validation and for test, got {shares!r}")
    for share in shares:
        check_number("each share of held_out", share, "[0, 1)")
    if sum(shares) >= 1:
        raise InputError(f"the shares of held_out must be below 1 together, got {shares[0]} + {shares[1]}")


def check_once(name: str, values: Iterable[str]) -> None:
    """Refuse a list that holds an entry twice."""
    values = list(values)
    if twice := sorted({v for v in values if values.count(v) > 1}):
        raise InputError(f"{name} must hold each entry once, got twice: {listing(twice)}")
