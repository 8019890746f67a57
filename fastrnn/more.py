"""Recurrent modules that torch.nn does not have, with torch.nn's constructor and call."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import init
from .functional import Lengths
from .modules import _Recurrent, _RecurrentCell, block_diagonal

__all__ = ["SLSTM", "IndRNN", "LayerNormGRU", "LayerNormGRUCell"]

_States = tuple[Tensor, Tensor, Tensor, Tensor]  # (h, c, n, m)


class _OwnCell(_Recurrent):
    """What modules share whose cell torch.nn does not have: made like one of its modules, with one bias and a
    weight_hh of another shape."""

    def _reshape_parameters(self, of_weight_hh: Callable[[Tensor], Tensor]) -> None:
        """For a constructor: ``of_weight_hh`` takes its part of torch.nn's."""
        for names in self._all_weights:  # weight_ih, weight_hh, and with biases bias_ih, bias_hh
            for name in names[3:]:
                delattr(self, name)
            del names[3:]
            kept = of_weight_hh(self.get_parameter(names[1]).detach())
            setattr(self, names[1], nn.Parameter(kept.clone(memory_format=torch.contiguous_format)))
        self._collect_weights()

    def flatten_parameters(self) -> None:
        """Nothing: that is for cuDNN."""

    def __prepare_scriptable__(self):  # torch.jit.script calls this first
        name = type(self).__name__
        raise RuntimeError(f"fastrnn: torch.jit.script does not take a fastrnn.{name}; torch.jit.trace does")

    def _is_torchs(self) -> bool:
        return False


class IndRNN(_OwnCell):
    """Layers of an independently recurrent network (Li et al. 2018): a unit sees its own state alone.

    At each step a layer computes, from its input x and its state h_prev of the step before,

        h = tanh(W_ih x + b_ih + u * h_prev), with relu in place of tanh if asked for

    Args:
        input_size: I, the width of x.
        hidden_size: H, the width of h.
        num_layers: L; the input of each layer but the first is the output of the layer before.
        nonlinearity: "tanh" or "relu".
        bias: whether there are biases.
        batch_first: input and output are [B, T, *] instead of [T, B, *]; the state is not.
        dropout: the probability with which training zeroes an element of each layer's output but the last's.
        bidirectional: D = 2 directions, the second from the end of the sequence to its start, instead of 1.
        device, dtype: those of the parameters.
        memory: keyword-only, as for ``RNN``.

    Inputs: x, h_0, and ``lengths``, ``reset`` and ``return_states`` as ``forward`` has them.
        x: [T, B, I], [B, T, I] with batch_first, [T, I] without a batch, or a PackedSequence.
        h_0: [L*D, B, H], without B if x has none; zeros if left out.

    Outputs: y, h_n.
        y: [T, B, D*H], h of the last layer at every step, in the form of x; the two directions side by side.
        h_n: [L*D, B, H], the state after each row's last step.

    Parameters of layer k, with the suffix ``_reverse`` for the second direction.
        weight_ih_l{k}: [H, I], from the second layer on [H, D*H].
        weight_hh_l{k}: [H], u.
        bias_ih_l{k}: [H], with bias.
        All are drawn uniformly from [-1/sqrt(H), 1/sqrt(H)].

    Raises:
        ValueError: sizes below 1, dropout outside [0, 1], another nonlinearity; input that is neither 2-D nor
            3-D, or of another dtype than the parameters.
        RuntimeError: input or state of other sizes than above.

    ``convert`` and ``to_torch`` leave it as it is; ``torch.onnx.export`` and ``torch.jit.script`` do not take
    it.

    Example:
        >>> import fastrnn, torch
        >>> rnn = fastrnn.IndRNN(8, 16, num_layers=2, nonlinearity="relu")
        >>> y, h_n = rnn(torch.randn(20, 3, 8))  # [T, B, I]
        >>> y.shape, h_n.shape, rnn.weight_hh_l0.shape
        (torch.Size([20, 3, 16]), torch.Size([2, 3, 16]), torch.Size([16]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
        *,
        memory: str | int = "store",
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
        mode, sizes = f"RNN_{nonlinearity.upper()}", (input_size, hidden_size, num_layers)
        super().__init__(mode, *sizes, bias, batch_first, dropout, bidirectional, 0, device, dtype)
        self.mode, self.nonlinearity = f"IND{mode}", nonlinearity
        self._reshape_parameters(lambda w_hh: w_hh[:, 0])
        self._set_options(memory=memory)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", nonlinearity=relu" if self.nonlinearity == "relu" else "")


class SLSTM(_OwnCell):
    """Layers of an sLSTM (Beck et al. 2024, "xLSTM", section 2.2, as its authors' code has it): an LSTM with
    an exponential input gate, whose c is divided by the sum n of its weights.

    At each step a layer computes, from its input x and its states h_prev, c_prev, n_prev and m_prev of the
    step before,

        i, f, g, o = W_ih x + b_ih + W_hh h_prev
        f = log(sigmoid(f))
        m = max(f + m_prev, i), but i where n_prev = 0: a unit that has seen nothing yet
        c = exp(f + m_prev - m) * c_prev + exp(i - m) * tanh(g)
        n = exp(f + m_prev - m) * n_prev + exp(i - m)
        h = sigmoid(o) * c / n

    Neither exponential exceeds 1: where n_prev = 0, the first one is held there. m only keeps the numbers in
    range. States begin at zero, and a ``reset`` makes them zero again.

    Args:
        input_size: I, the width of x.
        hidden_size: H, the width of each state.
        num_layers: L; the input of each layer but the first is the output of the layer before.
        bias: whether there are biases.
        batch_first: input and output are [B, T, *] instead of [T, B, *]; the states are not.
        dropout: the probability with which training zeroes an element of each layer's output but the last's.
        bidirectional: D = 2 directions, the second from the end of the sequence to its start, instead of 1.
        device, dtype: those of the parameters.
        heads: keyword-only; the units fall into so many heads of H/heads units that see each other alone:
            W_hh is block-diagonal. It is laid out densely at each call.
        memory: keyword-only, as for ``LSTM``.

    Inputs: x, (h_0, c_0, n_0, m_0), and ``lengths``, ``reset`` and ``return_states`` as ``forward`` has them.
        x: [T, B, I], [B, T, I] with batch_first, [T, I] without a batch, or a PackedSequence.
        h_0, c_0, n_0, m_0: each [L*D, B, H], without B if x has none; zeros if left out.

    Outputs: y, (h_n, c_n, n_n, m_n).
        y: [T, B, D*H], h of the last layer at every step, in the form of x; the two directions side by side.
        h_n, c_n, n_n, m_n: each [L*D, B, H], the states after each row's last step.

    Parameters of layer k, with the suffix ``_reverse`` for the second direction; gates in the order i f g o.
        weight_ih_l{k}: [4*H, I], from the second layer on [4*H, D*H].
        weight_hh_l{k}: [4*H, H/heads].
        bias_ih_l{k}: [4*H], with bias.
        All are drawn uniformly from [-1/sqrt(H), 1/sqrt(H)].

    Raises:
        TypeError: sizes, heads or flags of another type.
        ValueError: sizes below 1, heads that do not divide hidden_size, dropout outside [0, 1]; input that is
            neither 2-D nor 3-D, or of another dtype than the parameters; another number of states than four.
        RuntimeError: input or states of other sizes than above.

    ``convert`` and ``to_torch`` leave it as it is; ``torch.onnx.export`` and ``torch.jit.script`` do not take
    it.

    Example:
        >>> import fastrnn, torch
        >>> slstm = fastrnn.SLSTM(8, 16, num_layers=2, heads=4)
        >>> x = torch.randn(20, 3, 8)  # [T, B, I]
        >>> y, states = slstm(x)
        >>> y.shape, [state.shape for state in states] == [(2, 3, 16)] * 4
        (torch.Size([20, 3, 16]), True)
        >>> y, states = slstm(x[:1], states)  # one more step
    """

    _state_count = 4

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
        *,
        heads: int = 1,
        memory: str | int = "store",
    ) -> None:
        # The checks and parameters of an LSTM, which has four gates too.
        sizes = (input_size, hidden_size, num_layers)
        super().__init__("LSTM", *sizes, bias, batch_first, dropout, bidirectional, 0, device, dtype)
        if not isinstance(heads, int) or isinstance(heads, bool):
            raise TypeError(f"heads should be of type int, got: {type(heads).__name__}")
        if heads < 1 or hidden_size % heads:
            raise ValueError(f"heads must divide hidden_size = {hidden_size}, got {heads}")
        self.mode, self.heads = "SLSTM", heads
        self._reshape_parameters(lambda w_hh: w_hh[:, : hidden_size // heads])
        self._set_options(memory=memory)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", heads={self.heads}" if self.heads > 1 else "")

    def _weights(self) -> list[Tensor]:
        weights = super()._weights()
        if self.heads > 1:
            weights, each = list(weights), len(self._all_weights[0])
            weights[1::each] = [block_diagonal(w, self.heads) for w in weights[1::each]]
        return weights

    def _check_hidden_dims(self, hx: Any, dims: int) -> None:
        self._check_count(hx)
        if any(state.dim() != dims for state in hx):
            kind = "batched 3-D" if dims == 3 else "unbatched 2-D"
            got = ", ".join(f"{state.dim()}-D" for state in hx)
            raise RuntimeError(f"For {kind} input, the states should also be {dims}-D but got {got}")

    @staticmethod
    def _check_count(hx: Any) -> None:
        if not isinstance(hx, (tuple, list)) or len(hx) != 4:
            got = f"{len(hx)} of them" if isinstance(hx, (tuple, list)) else type(hx).__name__
            raise ValueError(f"SLSTM: hx should be the four states (h, c, n, m), got {got}")

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        self.check_input(input, batch_sizes)
        expected = self.get_expected_hidden_size(input, batch_sizes)
        for k, state in enumerate(hidden):
            self.check_hidden_size(state, expected, f"Expected hidden[{k}] size {{}}, got {{}}")

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        self._check_count(hx)
        return hx if permutation is None else tuple(state.index_select(1, permutation) for state in hx)

    if TYPE_CHECKING:

        @overload  # type: ignore[override, no-overload-impl]
        def forward(
            self, input: Tensor, hx: _States | None = None, lengths: Lengths | None = None,
            reset: Tensor | None = None, return_states: bool = False,
        ) -> tuple[Tensor, _States]: ...  # fmt: skip
        @overload
        def forward(
            self, input: PackedSequence, hx: _States | None = None
        ) -> tuple[PackedSequence, _States]: ...


# ---- Dreamer's GRU ---------------------------------------------------------------------------------------

_NORMS = {"layer": "layer_norm_gru", "rms": "rms_norm_gru"}


def _check_norm(norm: Any, eps: Any) -> None:
    if norm not in _NORMS:
        raise ValueError(f"norm must be 'layer' or 'rms', got {norm!r}")
    if not isinstance(eps, (int, float)) or isinstance(eps, bool) or not 0 < eps < float("inf"):
        raise ValueError(f"eps must be a finite number above 0, got {eps!r}")


def _norm_repr(module: Any) -> str:
    return (", norm=rms" if module.norm == "rms" else "") + (
        f", eps={module.eps}" if module.eps != 1e-5 else ""
    )


class LayerNormGRU(_OwnCell):
    """Layers of the GRU of Dreamer's world models (Hafner et al. 2020), whose gates are normalised together.

    At each step a layer computes, from its input x and its state h_prev of the step before,

        r, c, u = gain * n(W_ih x + W_hh h_prev) + shift, with bias n(W_ih x + W_hh h_prev + bias)
        u = sigmoid(u - 1)
        h = u * tanh(sigmoid(r) * c) + (1 - u) * h_prev

    n is over all 3*H: n(v) is v less its mean, divided by its standard deviation (Ba et al. 2016), or with
    norm="rms" v divided by the root of its mean square (Zhang and Sennrich 2019), eps added under the root.

    Args:
        input_size: I, the width of x.
        hidden_size: H, the width of h.
        num_layers: L; the input of each layer but the first is the output of the layer before.
        bias: whether there is a bias inside n.
        batch_first: input and output are [B, T, *] instead of [T, B, *]; the state is not.
        dropout: the probability with which training zeroes an element of each layer's output but the last's.
        bidirectional: D = 2 directions, the second from the end of the sequence to its start, instead of 1.
        device, dtype: those of the parameters.
        norm: keyword-only, "layer" or "rms".
        eps: keyword-only; Dreamer's code has 1e-3.
        heads, memory: keyword-only, as for ``GRU``; with heads (DreamerV3's blocks) ``weight_hh_l{k}`` is
            [3*H, H/n].

    Inputs: x, h_0, and ``lengths``, ``reset``, ``reset_to`` and ``return_states`` as ``forward`` has them.
        x: [T, B, I], [B, T, I] with batch_first, [T, I] without a batch, or a PackedSequence.
        h_0: [L*D, B, H], without B if x has none; zeros if left out.

    Outputs: y, h_n.
        y: [T, B, D*H], h of the last layer at every step, in the form of x; the two directions side by side.
        h_n: [L*D, B, H], the state after each row's last step.

    Parameters of layer k, with the suffix ``_reverse`` for the second direction; gates in the order r c u.
        weight_ih_l{k}: [3*H, I], from the second layer on [3*H, D*H].
        weight_hh_l{k}: [3*H, H].
        bias_l{k}: [3*H], with bias.
        gain_l{k}, shift_l{k}: [3*H], ones and zeros at first.
        The others are drawn uniformly from [-1/sqrt(H), 1/sqrt(H)].

    Raises:
        TypeError: sizes or flags of another type.
        ValueError: sizes below 1, dropout outside [0, 1], another norm, eps that is not above 0, heads that
            do not divide hidden_size; input that is neither 2-D nor 3-D, or of another dtype than the
            parameters.
        RuntimeError: input or state of other sizes than above.

    ``convert`` and ``to_torch`` leave it as it is; ``torch.onnx.export`` and ``torch.jit.script`` do not take
    it.

    Example:
        >>> import fastrnn, torch
        >>> gru = fastrnn.LayerNormGRU(8, 16, eps=1e-3)
        >>> episode_begins = torch.rand(20, 3) < 0.1
        >>> y, h_n = gru(torch.randn(20, 3, 8), reset=episode_begins)  # [T, B, I]
        >>> y.shape, h_n.shape, gru.gain_l0.shape
        (torch.Size([20, 3, 16]), torch.Size([1, 3, 16]), torch.Size([48]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = False,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
        *,
        norm: str = "layer",
        eps: float = 1e-5,
        heads: int = 1,
        memory: str | int = "store",
    ) -> None:
        _check_norm(norm, eps)
        sizes = (input_size, hidden_size, num_layers)
        super().__init__("GRU", *sizes, bias, batch_first, dropout, bidirectional, 0, device, dtype)
        self.mode, self.norm, self.eps = _NORMS[norm].upper(), norm, eps
        for names in self._all_weights:  # weight_ih, weight_hh, and with biases bias_ih, bias_hh
            suffix, weight = names[0].removeprefix("weight_ih"), self.get_parameter(names[0])
            for name in names[2:]:
                delattr(self, name)
            names[2:] = [f"{name}{suffix}" for name in ["bias"] * bias + ["gain", "shift"]]
            for name in names[2:]:
                self.register_parameter(name, self._new_vector(weight, 3))
            # A vector like the others to the kernels, of which the mean counts.
            self.register_buffer(f"_eps{suffix}", weight.new_full((hidden_size,), eps), persistent=False)
            names.append(f"_eps{suffix}")
        init.norm_(self)
        self._collect_weights()
        self._set_options(heads=heads, memory=memory)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.norm_(self)

    def extra_repr(self) -> str:
        return super().extra_repr() + _norm_repr(self)


class LayerNormGRUCell(_RecurrentCell, nn.RNNCellBase):
    """One step of ``LayerNormGRU``, the GRU of Dreamer's world models (Hafner et al. 2020).

        r, c, u = gain * n(W_ih x + W_hh h_prev) + shift, with bias n(W_ih x + W_hh h_prev + bias)
        u = sigmoid(u - 1)
        h = u * tanh(sigmoid(r) * c) + (1 - u) * h_prev

    Args:
        input_size: I, the width of x.
        hidden_size: H, the width of h.
        bias: whether there is a bias inside n.
        device, dtype: those of the parameters.
        norm, eps, heads: keyword-only, as for ``LayerNormGRU``; with heads ``weight_hh`` is [3*H, H/n].

    Inputs: x, h_prev.
        x: [B, I], or [I] without a batch.
        h_prev: [B, H], or [H]; zeros if left out.

    Output: h, of the shape of h_prev.

    Parameters, gates in the order r c u:
        weight_ih: [3*H, I].
        weight_hh: [3*H, H].
        bias: [3*H], with bias; else None.
        gain, shift: [3*H], ones and zeros at first.
        The others are drawn uniformly from [-1/sqrt(H), 1/sqrt(H)].

    Raises:
        ValueError: hidden_size below 1, another norm, eps that is not above 0, heads that do not divide
            hidden_size; input or state of other than one or two dimensions.
        RuntimeError: input or state of other sizes than above.

    Example:
        >>> import fastrnn, torch
        >>> cell = fastrnn.LayerNormGRUCell(8, 16, norm="rms")
        >>> h = None
        >>> for x in torch.randn(20, 3, 8):  # [B, I] of each step
        ...     h = cell(x, h)
        >>> h.shape
        torch.Size([3, 16])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = False,
        device=None,
        dtype=None,
        *,
        norm: str = "layer",
        eps: float = 1e-5,
        heads: int = 1,
    ) -> None:
        _check_norm(norm, eps)
        if hidden_size < 1:
            raise ValueError(f"hidden_size must be greater than zero, got {hidden_size}")
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)
        self.norm, self.eps = norm, eps
        for name in ("bias", "bias_ih", "bias_hh"):  # torch.nn's flag, and its biases
            delattr(self, name)
        for name in ("bias", "gain", "shift"):
            there = bias or name != "bias"
            self.register_parameter(name, self._new_vector(self.weight_ih, 3) if there else None)
        self.register_buffer("_eps", self.weight_ih.new_full((hidden_size,), eps), persistent=False)
        init.norm_(self)
        self._set_options(heads=heads)

    __prepare_scriptable__ = _OwnCell.__prepare_scriptable__

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.norm_(self)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", bias=True" if self.bias is not None else "") + _norm_repr(self)

    if TYPE_CHECKING:

        def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor: ...

    def _plain_cell(self) -> str:
        return _NORMS[self.norm]

    def _weights(self, w_hh: Tensor) -> tuple:
        return self.weight_ih, w_hh, self.bias, None, self.gain, self.shift, self._eps
