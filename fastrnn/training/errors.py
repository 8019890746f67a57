"""The one error of bad input: the command line shows its words without a traceback."""

from collections.abc import Iterable


class InputError(ValueError):
    """Data, a checkpoint or a setting that cannot be used; the message says what and where."""


def listing(names: Iterable[object], most: int = 10) -> str:
    """Names in a message: the first ones, each cut to a readable length, and how many more there are."""
    found = [" ".join(str(name).split()) for name in names]
    shown = [name if len(name) <= 60 else f"{name[:57]}..." for name in found[:most]]
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(shown) + more
