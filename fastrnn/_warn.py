"""Warnings that point at the user's line: the innermost one outside fastrnn and torch."""

import sys
import warnings

import torch

# torch decorates with the last three.
_LIBRARIES = ("fastrnn", "torch", "typing_extensions", "warnings", "contextlib")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    if torch.compiler.is_dynamo_compiling():  # there are no frames to look at
        return _warn_at_compile_time(f"fastrnn: {message}", category)
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_library(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    return warnings.warn(f"fastrnn: {message}", category, stacklevel=level)


def _warn_at_compile_time(message: str, category: type[Warning]) -> None:
    """Dynamo calls this instead of tracing it: a graph cannot warn."""
    warnings.warn(message, category, stacklevel=2)


# What torch.compiler.assume_constant_result does, without loading the compiler at every import.
_warn_at_compile_time._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in _LIBRARIES
