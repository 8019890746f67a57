"""Drop-in torch.nn.LSTM, GRU and RNN with fused kernels: change the import, and nothing else."""

import sys

if sys.argv[:2] == ["-m", "train"] and "fastrnn" in sys.orig_argv:
    from ._load import let_threads_sleep

    let_threads_sleep()  # OpenMP reads it when torch is loaded, which is below

try:
    from . import _compile, _flops, functional, init  # noqa: F401  (for torch.compile, flop_counter)
    from ._explain import Explanation, explain
    from ._prepack import prepack
    from .convert import convert, patch, to_torch
    from .functional import FallbackWarning, set_strict
    from .minimal import QRNN, SRU, MinGRU, MinLSTM
    from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
    from .more import SLSTM, IndRNN, LayerNormGRU, LayerNormGRUCell
except (ImportError, AttributeError, RuntimeError, ValueError) as error:  # a build older than the sources
    # The doctor explains what is wrong here, so it alone gets past it.
    if sys.argv[:2] != ["-m", "doctor"]:
        raise ImportError(f"{error}; 'python -m fastrnn doctor' says what to do") from error

__version__ = "0.1.0"
__all__ = [
    "GRU", "LSTM", "QRNN", "RNN", "SLSTM", "SRU", "Explanation", "FallbackWarning", "GRUCell", "IndRNN",
    "LSTMCell", "LayerNormGRU", "LayerNormGRUCell", "MinGRU", "MinLSTM", "RNNCell", "convert", "explain",
    "functional", "init", "patch", "prepack", "set_strict", "to_torch",
]  # fmt: skip
