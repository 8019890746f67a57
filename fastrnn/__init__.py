"""Drop-in torch.nn.LSTM, GRU and RNN with fused kernels: change the import, and nothing else."""

from . import functional
from .convert import convert, to_torch
from .functional import FallbackWarning, set_strict
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__version__ = "0.1.0"
__all__ = [
    "GRU", "LSTM", "RNN", "FallbackWarning", "GRUCell", "LSTMCell", "RNNCell", "convert", "functional",
    "set_strict", "to_torch",
]  # fmt: skip
