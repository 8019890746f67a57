"""Initialisations of recurrent weights in place, for torch.nn's modules and for fastrnn's.

Each takes a module or a model, goes through all layers and directions of every module inside that it is for,
and returns what it was given. ValueError where there is none, or where one has not the parameters.
"""

from typing import Any, TypeVar

from torch import Tensor, nn

__all__ = ["chrono_", "forget_bias_", "orthogonal_"]

_Module = TypeVar("_Module", bound=nn.Module)
_ALL = (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)
_LSTMS = (nn.LSTM, nn.LSTMCell)


def _suffixes(module: Any) -> list[str]:
    """Of the parameters of each layer and direction; a cell's have none."""
    if isinstance(module, nn.RNNCellBase):
        return [""]
    ways = ("", "_reverse") if module.bidirectional else ("",)
    return [f"_l{k}{way}" for k in range(module.num_layers) for way in ways]


def _block_size(module: Any, name: str) -> int:
    """H, or with heads (of fastrnn's modules) the units of a head in W_hh."""
    heads = getattr(module, "_fused_options", {}).get("heads", 1) if name == "weight_hh" else 1
    return module.hidden_size // heads


def _blocks(model: nn.Module, kinds: tuple[type, ...], *names: str) -> list[list[tuple[Tensor, ...]]]:
    """Of each layer and direction the parameters of these names, each as its gates' blocks [H, *], with
    heads as those of each head."""
    modules: list[tuple[str, Any]] = [(path, m) for path, m in model.named_modules() if isinstance(m, kinds)]
    if not modules:
        raise ValueError(f"no {', '.join(kind.__name__ for kind in kinds)} in {type(model).__name__}")
    found = []
    for path, module in modules:
        for suffix in _suffixes(module):
            parameters = [module._parameters.get(name + suffix) for name in names]
            for name, parameter in zip(names, parameters, strict=True):
                if parameter is None:
                    where = path or type(module).__name__
                    raise ValueError(f"{where} has no parameter {name}{suffix} (no biases, or parametrized)")
            sizes = [_block_size(module, name) for name in names]
            blocks = [p.detach().split(size) for p, size in zip(parameters, sizes, strict=True)]
            found.append(blocks)
    return found


def orthogonal_(module: _Module) -> _Module:
    """Makes each gate's block [H, P] of every W_hh, with heads each head's, orthogonal by
    ``torch.nn.init.orthogonal_`` (Saxe et al. 2014): without the gates, h keeps its length from step to
    step."""
    for (blocks,) in _blocks(module, _ALL, "weight_hh"):
        for block in blocks:
            nn.init.orthogonal_(block)
    return module


def forget_bias_(module: _Module, v: float) -> _Module:
    """Sets the biases of every LSTM's forget gate: bias_ih's part to v and bias_hh's to 0, so that v is their
    sum. A positive one makes a new network remember (Gers et al. 2000; Jozefowicz et al. 2015 take 1)."""
    for b_ih, b_hh in _blocks(module, _LSTMS, "bias_ih", "bias_hh"):  # (i) f g o
        b_ih[-3].fill_(v)
        b_hh[-3].zero_()
    return module


def norm_(module: _Module) -> _Module:
    """Sets every gain of layer normalisation to 1 and every shift to 0."""
    for name, parameter in module.named_parameters():
        kind = name.rpartition(".")[2].partition("_")[0]
        if kind in ("gain", "shift"):
            parameter.detach().fill_(kind == "gain")
    return module


def chrono_(module: _Module, t_max: float) -> _Module:
    """Draws the biases of every LSTM for memories of up to t_max steps: b_f = log(u), u uniform in
    [1, t_max - 1], and b_i = -b_f (Tallec and Ollivier 2018, section 2). bias_ih holds them, and the parts of
    bias_hh are 0; those of the other gates stay as they are. ValueError unless t_max is at least 2."""
    if not isinstance(t_max, (int, float)) or not 2 <= t_max < float("inf"):
        raise ValueError(f"t_max should be a finite number of at least 2, got {t_max!r}")
    for b_ih, b_hh in _blocks(module, _LSTMS, "bias_ih", "bias_hh"):
        b_ih[-3].uniform_(1, float(t_max) - 1).log_()
        b_hh[-3].zero_()
        if len(b_ih) > 3:  # with i = 1 - f there is no b_i
            b_ih[0].copy_(-b_ih[1])
            b_hh[0].zero_()
    return module
