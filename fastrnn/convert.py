"""Whole models between torch.nn and fastrnn: the same parameters, another class. patch() reaches torch.nn's
constructors and functions themselves."""

import inspect
import types
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from . import _options, _prepack, functional, minimal, modules
from ._warn import warn

__all__ = ["convert", "patch", "to_torch"]

_Model = TypeVar("_Model", bound=nn.Module)
_TO_FASTRNN: dict[type, type] = {getattr(nn, name): getattr(modules, name) for name in modules.__all__}
_TO_TORCH = {ours: theirs for theirs, ours in _TO_FASTRNN.items()}


# ---- The class that stands for another one -------------------------------------------------------------


class _Left(Exception):
    """Why a module keeps its class."""


def _new_converted(cls: type) -> nn.Module:
    fused: Any = _fused_subclass(cls)
    return fused.__new__(fused)


def _reduce_converted(self: nn.Module, protocol: int) -> tuple:
    """Pickles by the name of the user's class, because the class made here cannot be imported."""
    return _new_converted, (type(self).__bases__[0],), *object.__reduce_ex__(self, 2)[2:]


@cache
def _fused_subclass(cls: type) -> type:
    """The user's subclass of a class of torch.nn, with fastrnn's forward after the user's classes."""
    base = next(_TO_FASTRNN[c] for c in cls.__mro__ if c in _TO_FASTRNN)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    namespace = names | {"__reduce_ex__": _reduce_converted, "_converted": True}
    return type(cls)(cls.__name__, (cls, base), namespace)


def _fused(cls: type) -> type:
    if cls in _TO_FASTRNN:
        return _TO_FASTRNN[cls]
    theirs = next(c for c in cls.__mro__ if c in _TO_FASTRNN)
    if cls.forward is not theirs.forward:  # type: ignore[attr-defined]
        raise _Left(f"{cls.__name__} has a forward of its own, whose calls of torch.nn's patch() redirects")
    users = set().union(*map(vars, cls.__mro__[: cls.__mro__.index(theirs)]))
    if taken := users & (set(dir(_TO_FASTRNN[theirs])) - set(dir(theirs))):
        raise _Left(f"{cls.__name__} has its own {', '.join(sorted(taken))}, which fastrnn's uses")
    return _fused_subclass(cls)


def _unfused(cls: type) -> type:
    if cls in _TO_TORCH:
        return _TO_TORCH[cls]
    if "_converted" in vars(cls):
        return cls.__bases__[0]
    raise _Left(f"{cls.__name__} is a subclass of fastrnn's; derive it from torch.nn's and convert() it")


def _target(module: nn.Module, change: Callable[[type], type]) -> type:
    cls: type = type(module)
    if cls.__module__ != parametrize.__name__:
        return change(cls)
    # parametrize derived this class from the module's own: the same properties go onto the new base.
    base = change(cls.__bases__[0])
    namespace = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(f"Parametrized{base.__name__}", (base,), namespace)


# ---- A forward that has been replaced on the module itself ---------------------------------------------


class _Rebinding:
    """Replaces the old class's forward, bound to ``module``, by the new class's in whatever holds it: an
    attribute, a partial, a closure or a wrapper."""

    def __init__(self, module: nn.Module, old: Any, new: Any) -> None:
        self.module, self.old, self.new = module, old, new
        self.found = False
        self.seen: set[int] = set()

    def __call__(self, value: Any) -> Any:
        if isinstance(value, types.MethodType):
            if value.__self__ is self.module and value.__func__ is self.old:
                self.found = True
                return types.MethodType(self.new, self.module)
            self(value.__func__)
        elif isinstance(value, (types.FunctionType, partial)) and id(value) not in self.seen:
            self.seen.add(id(value))
            for cell in getattr(value, "__closure__", None) or ():
                with suppress(ValueError):  # an empty cell
                    self._replace(cell, "cell_contents")
            self._replace(value, "__wrapped__")
            if isinstance(value, partial):
                args, keywords = map(self, value.args), {k: self(v) for k, v in value.keywords.items()}
                value.__setstate__((self(value.func), tuple(args), keywords, vars(value)))  # type: ignore[attr-defined]
        return value

    def _replace(self, holder: Any, name: str) -> None:
        if hasattr(holder, name):
            setattr(holder, name, self(getattr(holder, name)))


# ---- Models --------------------------------------------------------------------------------------------


def _change_class(module: nn.Module, change: Callable[[type], type]) -> None:
    if change is _unfused and (options := _options.beyond_torch(module._fused_options)):  # type: ignore[arg-type]
        raise _Left(f"torch.nn has no {_options.text(options)}")
    target: Any = _target(module, change)
    rebind = _Rebinding(module, type(module).forward, target.forward)
    held = {name: rebind(value) for name, value in vars(module).items() if callable(value)}
    if "forward" in held and change is _fused and not rebind.found:
        raise _Left("its forward has been replaced by one that does not call the class's")
    _prepack.drop(module)
    try:
        module.__class__ = target
    except TypeError as error:  # __slots__
        raise _Left(str(error)) from None
    vars(module).update(held)


def _change_classes(
    model: _Model, name: str, change: Callable[[type], type], bases: Iterable[Any], verbose: bool
) -> _Model:
    left = []
    for path, module in model.named_modules():
        path, before = path or "the module itself", type(module)
        is_ours = isinstance(module, modules._Fused)
        if isinstance(module, tuple(bases)) and is_ours is (change is _unfused):
            try:
                _change_class(module, change)  # type: ignore[arg-type]
                if verbose:
                    print(f"fastrnn: {name}() turns {path} from {_text(before)} into {_text(type(module))}")
            except _Left as reason:
                left.append(f"{path} ({reason})")
        elif change is _unfused and (is_ours or isinstance(module, minimal._LinearRecurrent)):
            left.append(f"{path} (torch.nn has no {type(module).__name__})")
        elif change is _fused and getattr(module, "original_name", None) in modules.__all__:
            left.append(f"{path} (torch.jit.script has compiled it; convert() the model before)")
    if left:
        warn(f"{name}() leaves as they are: {', '.join(left)}")
    return model


def _text(cls: type) -> str:
    return f"{cls.__module__.partition('.modules')[0]}.{cls.__qualname__}"


def convert(model: _Model, *, verbose: bool = False) -> _Model:
    """Turns every torch.nn.LSTM, GRU, RNN and cell inside ``model`` into fastrnn's, in place; returns it.

    Parameters, buffers, hooks and the training flag stay the very same objects, so an optimizer that holds
    the parameters goes on working. Parametrized modules are converted, and subclasses of torch.nn's whose
    forward is torch.nn's: they become a subclass of their class and of fastrnn's, pickled by theirs. A
    forward that has been replaced on a module calls fastrnn's where it called the class's.

    Warns of modules that it leaves as they are, by name and with the reason: subclasses with a forward of
    their own, modules whose forward has been replaced by one that calls no other, and those that
    torch.jit.script has compiled. With ``verbose`` it prints a line for each that it converts.
    """
    return _change_classes(model, "convert", _fused, _TO_FASTRNN, verbose)


def to_torch(model: _Model, *, verbose: bool = False) -> _Model:
    """Undoes convert(): every fastrnn module inside ``model`` becomes torch.nn's, in place; returns it.

    For tools that know torch.nn's classes exactly (``torch.ao.quantization``, ``type(m) == nn.GRU``) and for
    ``torch.jit.script``. Warns of modules that it leaves as they are, by name: subclasses of fastrnn's,
    modules with options that torch.nn's have not, and classes that torch.nn has not. ``verbose`` as in
    ``convert``.
    """
    return _change_classes(model, "to_torch", _unfused, _TO_TORCH, verbose)


# ---- Code that makes torch.nn's modules, or calls its functions, itself --------------------------------

_FUNCTIONS = [f"{cell}{form}" for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu") for form in ("", "_cell")]


def _new_of(theirs: Any) -> Callable[..., nn.Module]:
    def new(cls: type, *args: Any, **keywords: Any) -> nn.Module:
        from_constructor = len(args) + len(keywords) > 0  # and not from a copy or a pickle
        if patch._count > 0 and from_constructor and not issubclass(cls, modules._Fused):
            with suppress(_Left):
                cls = _fused(cls)
        return object.__new__(cls)

    # inspect asks __new__ first, where a class has both.
    new.__signature__ = inspect.signature(theirs.__init__)  # type: ignore[attr-defined]
    return new


class patch:
    """Sends torch.nn's recurrent constructors and functions to fastrnn, for code that cannot be changed.

    While it is on, ``torch.nn.LSTM(...)``, ``GRU``, ``RNN`` and their cells, under whatever name the code has
    imported them, make fastrnn's modules, and so do subclasses that keep torch.nn's forward; direct calls of
    ``torch._VF.lstm``, ``gru``, ``rnn_tanh``, ``rnn_relu`` and of their ``_cell`` forms, which torch.nn's own
    modules make too, take fastrnn's functional forms. As a context manager it ends with the block, as a plain
    call it stays on. It holds for all threads of the process; modules made meanwhile stay fastrnn's.

    Example:
        >>> import fastrnn, torch
        >>> with fastrnn.patch():
        ...     model = torch.nn.Sequential(torch.nn.LSTM(8, 16))
        >>> type(model[0]).__module__
        'fastrnn.modules'
    """

    _count = 0  # of those that are on

    def __init__(self) -> None:
        patch._count += 1
        for name in _FUNCTIONS:
            setattr(torch._VF, name, getattr(functional, name))
        for theirs in _TO_FASTRNN:
            # It stays: a class whose __new__ has been deleted takes no arguments any more in CPython.
            if "__new__" not in vars(theirs):
                # static, as Python makes it in a class body: DataParallel calls replica.__new__(cls).
                theirs.__new__ = staticmethod(_new_of(theirs))  # type: ignore[method-assign, assignment]

    def __enter__(self) -> "patch":
        return self

    def __exit__(self, *error: object) -> None:
        patch._count -= 1
        if patch._count == 0:
            for name in _FUNCTIONS:
                delattr(torch._VF, name)  # what lies under it is torch's
