"""torch.compile takes fastrnn's layers into its graphs.

Dynamo breaks the graph at every instance of ``torch.nn.LSTM``, ``GRU`` and ``RNN``, which it would unroll
over time, and so at fastrnn's subclasses, which are one operator a layer. torch has a setting that allows
all of them (``torch._dynamo.config.allow_rnn``), and none for a class. So the setting is on while Dynamo's
one method that asks for it looks at a layer of fastrnn's; torch.nn's own stay as they are. Where a torch
has no such method, the message of its graph break names the setting.
"""

import importlib.util
import sys
from functools import wraps
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

from .modules import _Recurrent

_BUILDER = "torch._dynamo.variables.builder"


def _allow_layers(builder: Any) -> None:
    cls: Any = getattr(builder, "VariableBuilder", None)
    wrap = getattr(cls, "wrap_module", None)
    if wrap is None or not hasattr(builder.config, "allow_rnn"):
        return

    @wraps(wrap)
    def wrap_module(self, value):
        if not isinstance(value, _Recurrent):
            return wrap(self, value)
        with builder.config.patch(allow_rnn=True):
            return wrap(self, value)

    cls.wrap_module = wrap_module


class _OnceLoaded(MetaPathFinder):
    """torch loads its compiler at the first use, and importing fastrnn does not load it either."""

    def find_spec(self, name, path=None, target=None):
        if name != _BUILDER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module  # type: ignore[union-attr]

        def exec_module(module: ModuleType) -> None:
            run(module)
            _allow_layers(module)

        spec.loader.exec_module = exec_module  # type: ignore[union-attr, method-assign]
        return spec


if _BUILDER in sys.modules:
    _allow_layers(sys.modules[_BUILDER])
else:
    sys.meta_path.insert(0, _OnceLoaded())
