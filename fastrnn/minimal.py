"""``MinGRU``, ``MinLSTM``, ``QRNN`` and ``SRU``: recurrent layers whose gates see the input alone, so that
the recurrence is a linear scan, which runs in parallel over time (``functional.linear_scan``).

x is multiplied once for all steps, the gates are torch operations, and the scan is the kernel.
"""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from torch.nn.utils.rnn import PackedSequence

from . import functional
from ._warn import warn
from .functional import Lengths
from .modules import _rows_of_first_step
from .rows import Rows

__all__ = ["QRNN", "SRU", "MinGRU", "MinLSTM"]

Scan = Callable[[Tensor, Tensor], Tensor]  # a, b [N, H] -> every state [N, H]


class _LinearRecurrent(nn.Module):
    """Constructor and call of torch.nn.GRU for layers that are one linear scan a direction."""

    _gates: int  # G: blocks of H rows in weight_ih

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
    ) -> None:
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("num_layers", num_layers)):
            if not isinstance(size, int):
                raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
            if size <= 0:
                raise ValueError(f"{name} must be greater than zero, got {size}")
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout <= 1:
            raise ValueError(
                "dropout should be a number in range [0, 1] representing the probability of an element being "
                f"zeroed, got {dropout}"
            )
        if dropout > 0 and num_layers == 1:
            warn(f"dropout is between layers, and there is one: num_layers=1, dropout={dropout}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout = bias, batch_first, float(dropout)
        self.bidirectional = bidirectional
        D = len(self._directions())
        for layer in range(num_layers):
            weight, biases = self._shapes(input_size if layer == 0 else D * hidden_size)
            for suffix in self._directions():
                shapes = {"weight_ih": weight} | ({"bias_ih": (biases,)} if bias else {})
                for name, shape in shapes.items():
                    parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    self.register_parameter(f"{name}_l{layer}{suffix}", parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All are drawn uniformly from [-1/sqrt(H), 1/sqrt(H)]."""
        bound = self.hidden_size**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        defaults = {
            "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0, "bidirectional": False,
        }  # fmt: skip
        changed = {name: getattr(self, name) for name in defaults if getattr(self, name) != defaults[name]}
        return ", ".join(
            [f"{self.input_size}, {self.hidden_size}", *(f"{name}={v}" for name, v in changed.items())]
        )

    # ---- What a class is -------------------------------------------------------------------------------

    def _shapes(self, width: int) -> tuple[tuple[int, int], int]:
        """The shape of weight_ih and the size of bias_ih, for inputs [N, width]."""
        return (self._gates * self.hidden_size, width), self._gates * self.hidden_size

    def _output(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, direction: int, scan: Scan
    ) -> Tensor:
        """y [N, H] of one direction of one layer, whose input is x [N, width]. Calls ``scan`` once."""
        raise NotImplementedError

    # ---- Layers and directions -------------------------------------------------------------------------

    def _directions(self) -> tuple[str, ...]:
        return ("", "_reverse") if self.bidirectional else ("",)

    def _layers(self, x: Tensor, hx: Tensor, rows: Rows, return_states: bool) -> tuple[Tensor, Tensor]:
        """y [N, D*H], and the last states [L*D, B, H] or all of them [T, L*D, B, H]."""
        x = rows.without_padding(x)
        every: list[Tensor] = []
        last: list[Tensor] = []

        def scan_direction(name: str, direction: int) -> Tensor:
            def scan(a: Tensor, b: Tensor) -> Tensor:
                h0 = hx[len(last)].to(a.dtype)
                states, end = functional.scan_linearly(a, b, h0, rows, direction == 1)
                every.append(states)
                last.append(end)
                return states

            bias = getattr(self, f"bias_ih{name}") if self.bias else None
            y = self._output(x, getattr(self, f"weight_ih{name}"), bias, rows, direction, scan)
            return rows.without_padding(y)  # its gradient too: NaN there would reach the output gate's

        for layer in range(self.num_layers):
            outputs = [scan_direction(f"_l{layer}{suffix}", d) for d, suffix in enumerate(self._directions())]
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
            if self.dropout > 0 and self.training and layer < self.num_layers - 1:
                x = functional._dropout(x, self.dropout, rows)
        return x, rows.states(torch.stack(every, 1)) if return_states else torch.stack(last)

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, lengths: Lengths | None = None,
        reset: Tensor | None = None, return_states: bool = False,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip
    @overload
    def forward(self, input: PackedSequence, hx: Tensor | None = None) -> tuple[PackedSequence, Tensor]: ...

    def forward(self, input, hx=None, lengths=None, reset=None, return_states=False):
        """(output, h_n), with the arguments of ``fastrnn.GRU``'s forward:

        input [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence; hx [L*D, B, H],
        without B for unbatched input, zeros if None; ``lengths``, ``reset`` and ``return_states`` for dense
        sequences.
        """
        extended = lengths is not None or reset is not None or return_states
        if isinstance(input, PackedSequence):
            if extended:
                raise ValueError("lengths, reset and return_states take dense sequences, not packed ones")
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(
                f"{type(self).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead"
            )
        is_batched, batch_dim = input.dim() == 3, 0 if self.batch_first else 1
        if hx is not None and hx.dim() != input.dim():
            kind = "batched 3-D" if is_batched else "unbatched 2-D"
            raise RuntimeError(
                f"For {kind} input, hx should also be {input.dim()}-D but got {hx.dim()}-D tensor"
            )
        if not is_batched:
            input, hx = input.unsqueeze(batch_dim), None if hx is None else hx.unsqueeze(1)
            lengths = None if lengths is None else functional.as_lengths(lengths).reshape(1)
            reset = None if reset is None else reset.unsqueeze(batch_dim)
        B, T = input.shape[batch_dim], input.shape[1 - batch_dim]
        if T == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        rows = functional.dense_rows(T, B, self.batch_first, lengths, reset)
        y, states = self._layers(*self._checked(input.flatten(0, 1), hx, B), rows, return_states)
        y = rows.dense(y)
        return (y, states) if is_batched else (y.squeeze(batch_dim), states.squeeze(-2))

    def _forward_packed(self, input: PackedSequence, hx: Tensor | None) -> tuple[PackedSequence, Tensor]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        B = _rows_of_first_step(batch_sizes, hx)
        if hx is not None and sorted_indices is not None:
            hx = hx.index_select(1, sorted_indices)
        rows = Rows(batch_sizes.shape[0], B, batch_sizes=batch_sizes)
        y, h_n = self._layers(*self._checked(data, hx, B), rows, False)
        if unsorted_indices is not None:
            h_n = h_n.index_select(1, unsorted_indices)
        return PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices), h_n

    def _checked(self, x: Tensor, hx: Tensor | None, B: int) -> tuple[Tensor, Tensor]:
        """x [N, I] and hx [L*D, B, H], which may be left out."""
        if x.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.shape[-1]}"
            )
        expected = (self.num_layers * len(self._directions()), B, self.hidden_size)
        if hx is None:
            hx = x.new_zeros(expected)
        elif tuple(hx.shape) != expected:
            raise RuntimeError(f"Expected hidden size {expected}, got {list(hx.shape)}")
        functional._check_attributes(x, [hx], list(self.parameters()))
        return x, hx


class MinGRU(_LinearRecurrent):
    """Layers of a minGRU (Feng et al. 2024, "Were RNNs All We Needed?", section 3.1): a GRU whose gates do
    not see the state, and without a reset gate.

    At each step a layer computes, from its input x and its state h_prev of the step before,

        z = sigmoid(W_z x + b_z)
        c = W_c x + b_c
        h = (1 - z) * h_prev + z * c

    Args:
        input_size: I, the width of x.
        hidden_size: H, the width of h.
        num_layers: L; the input of each layer but the first is the output of the layer before.
        bias: whether there are biases.
        batch_first: input and output are [B, T, *] instead of [T, B, *]; the state is not.
        dropout: the probability with which training zeroes an element of each layer's output but the last's.
        bidirectional: D = 2 directions, the second from the end of the sequence to its start, instead of 1.
        device, dtype: those of the parameters.

    Inputs: x, h_0, and ``lengths``, ``reset`` and ``return_states`` as ``fastrnn.GRU`` has them.
        x: [T, B, I], [B, T, I] with batch_first, [T, I] without a batch, or a PackedSequence.
        h_0: [L*D, B, H], without B if x has none; zeros if left out.

    Outputs: y, h_n.
        y: [T, B, D*H], h of the last layer at every step, in the form of x; the two directions side by side.
        h_n: [L*D, B, H], the state after each row's last step.

    Parameters of layer k, with the suffix ``_reverse`` for the second direction; blocks in the order z c.
        weight_ih_l{k}: [2*H, I], from the second layer on [2*H, D*H].
        bias_ih_l{k}: [2*H], with bias.
        All are drawn uniformly from [-1/sqrt(H), 1/sqrt(H)].

    Raises:
        ValueError: hidden_size or num_layers below 1, dropout outside [0, 1]; input that is neither 2-D nor
            3-D.
        RuntimeError: input or state of other sizes than above, or of another dtype than the parameters.

    Example:
        >>> import fastrnn, torch
        >>> gru = fastrnn.MinGRU(8, 16, num_layers=2)
        >>> x = torch.randn(20, 3, 8)  # [T, B, I]
        >>> y, h_n = gru(x)
        >>> y.shape, h_n.shape
        (torch.Size([20, 3, 16]), torch.Size([2, 3, 16]))
        >>> y, h_n = gru(x[:1], h_n)  # one more step
    """

    _gates = 2

    def _output(self, x, weight, bias, rows, direction, scan):
        z, c = linear(x, weight, bias).chunk(2, -1)
        z = z.sigmoid()
        return scan(1 - z, z * c)


class MinLSTM(_LinearRecurrent):
    """Layers of a minLSTM (Feng et al. 2024, "Were RNNs All We Needed?", section 3.2): an LSTM whose gates do
    not see the state, with forget and input gates that sum to one, and without an output gate.

    At each step a layer computes, from its input x and its state h_prev of the step before,

        f = sigmoid(W_f x + b_f)
        i = sigmoid(W_i x + b_i)
        c = W_c x + b_c
        h = f / (f + i) * h_prev + i / (f + i) * c

    Args:
        input_size: I, the width of x.
        hidden_size: H, the width of h.
        num_layers: L; the input of each layer but the first is the output of the layer before.
        bias: whether there are biases.
        batch_first: input and output are [B, T, *] instead of [T, B, *]; the state is not.
        dropout: the probability with which training zeroes an element of each layer's output but the last's.
        bidirectional: D = 2 directions, the second from the end of the sequence to its start, instead of 1.
        device, dtype: those of the parameters.

    Inputs: x, h_0, and ``lengths``, ``reset`` and ``return_states`` as ``fastrnn.GRU`` has them.
        x: [T, B, I], [B, T, I] with batch_first, [T, I] without a batch, or a PackedSequence.
        h_0: [L*D, B, H], without B if x has none; zeros if left out.

    Outputs: y, h_n.
        y: [T, B, D*H], h of the last layer at every step, in the form of x; the two directions side by side.
        h_n: [L*D, B, H], the state after each row's last step.

    Parameters of layer k, with the suffix ``_reverse`` for the second direction; blocks in the order f i c.
        weight_ih_l{k}: [3*H, I], from the second layer on [3*H, D*H].
        bias_ih_l{k}: [3*H], with bias.
        All are drawn uniformly from [-1/sqrt(H), 1/sqrt(H)].

    Raises:
        ValueError: hidden_size or num_layers below 1, dropout outside [0, 1]; input that is neither 2-D nor
            3-D.
        RuntimeError: input or state of other sizes than above, or of another dtype than the parameters.

    Example:
        >>> import fastrnn, torch
        >>> lstm = fastrnn.MinLSTM(8, 16, bidirectional=True, batch_first=True)
        >>> x = torch.randn(3, 20, 8)  # [B, T, I]
        >>> y, h_n = lstm(x, lengths=torch.tensor([20, 7, 11]))
        >>> y.shape, h_n.shape
        (torch.Size([3, 20, 32]), torch.Size([2, 3, 16]))
    """

    _gates = 3

    def _output(self, x, weight, bias, rows, direction, scan):
        f, i, c = linear(x, weight, bias).chunk(3, -1)
        # f / (f + i) = sigmoid(log f - log i), also where both underflow to zero.
        f = (nn.functional.logsigmoid(f) - nn.functional.logsigmoid(i)).sigmoid()
        return scan(f, (1 - f) * c)


class QRNN(_LinearRecurrent):
    """Layers of a QRNN (Bradbury et al. 2017, equations 1 and 4, fo-pooling): convolutions over time with a
    gated recurrence between them.

    At each step a layer computes, from its inputs x and x_prev, of this step and the one before, and its
    state c_prev,

        z = tanh(W_z [x_prev, x] + b_z), with window=1 W_z x + b_z, and likewise below
        f = sigmoid(W_f [x_prev, x] + b_f)
        o = sigmoid(W_o [x_prev, x] + b_o)
        c = f * c_prev + (1 - f) * z
        h = o * c

    x_prev is zero at a row's first step and where ``reset`` is true.

    Args:
        input_size: I, the width of x.
        hidden_size: H, the width of h and c.
        num_layers: L; the input of each layer but the first is the output of the layer before.
        bias: whether there are biases.
        batch_first: input and output are [B, T, *] instead of [T, B, *]; the state is not.
        dropout: the probability with which training zeroes an element of each layer's output but the last's.
        bidirectional: D = 2 directions, the second from the end of the sequence to its start, instead of 1.
        device, dtype: those of the parameters.
        window: the steps of x that a gate sees, 1 or 2; keyword-only.

    Inputs: x, c_0, and ``lengths``, ``reset`` and ``return_states`` as ``fastrnn.GRU`` has them.
        x: [T, B, I], [B, T, I] with batch_first, [T, I] without a batch, or a PackedSequence.
        c_0: [L*D, B, H], without B if x has none; zeros if left out.

    Outputs: y, c_n.
        y: [T, B, D*H], h of the last layer at every step, in the form of x; the two directions side by side.
        c_n: [L*D, B, H], the state after each row's last step; with ``return_states`` every c.

    Parameters of layer k, with the suffix ``_reverse`` for the second direction; blocks in the order z f o.
        weight_ih_l{k}: [3*H, I], from the second layer on [3*H, D*H].
            With window=2 twice as wide, first the part for x_prev.
        bias_ih_l{k}: [3*H], with bias.
        All are drawn uniformly from [-1/sqrt(H), 1/sqrt(H)].

    Raises:
        ValueError: hidden_size or num_layers below 1, dropout outside [0, 1], another window; input that is
            neither 2-D nor 3-D.
        RuntimeError: input or state of other sizes than above, or of another dtype than the parameters.

    Example:
        >>> import fastrnn, torch
        >>> qrnn = fastrnn.QRNN(8, 16, num_layers=2, window=2)
        >>> y, c_n = qrnn(torch.randn(20, 3, 8))  # [T, B, I]
        >>> y.shape, c_n.shape
        (torch.Size([20, 3, 16]), torch.Size([2, 3, 16]))
    """

    _gates = 3

    def __init__(self, *args: Any, window: int = 1, **keywords: Any) -> None:
        if window not in (1, 2):
            raise ValueError(f"window must be 1 or 2, got {window}")
        self.window = window
        super().__init__(*args, **keywords)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", window={self.window}" if self.window > 1 else "")

    def _shapes(self, width):
        return super()._shapes(self.window * width)

    def _output(self, x, weight, bias, rows, direction, scan):
        if self.window == 2:
            before = rows.previous(x, x.new_zeros(rows.B, x.shape[1]), direction)
            x = torch.cat((before, x), -1)
        z, f, o = linear(x, weight, bias).chunk(3, -1)
        f = f.sigmoid()
        return o.sigmoid() * scan(f, (1 - f) * z.tanh())


class SRU(_LinearRecurrent):
    """Layers of a simple recurrent unit (Lei et al. 2018, in the form of the paper's first version,
    arXiv:1709.02755v1, equations 3 to 7): a gated recurrence with a highway connection past it.

    At each step a layer computes, from its input x and its state c_prev of the step before,

        u = W x
        f = sigmoid(W_f x + b_f)
        r = sigmoid(W_r x + b_r)
        c = f * c_prev + (1 - f) * u
        h = r * tanh(c) + (1 - r) * x, with W_x x in place of x in layers whose input is not H wide

    Args:
        input_size: I, the width of x.
        hidden_size: H, the width of h and c.
        num_layers: L; the input of each layer but the first is the output of the layer before.
        bias: whether there are biases.
        batch_first: input and output are [B, T, *] instead of [T, B, *]; the state is not.
        dropout: the probability with which training zeroes an element of each layer's output but the last's.
        bidirectional: D = 2 directions, the second from the end of the sequence to its start, instead of 1.
        device, dtype: those of the parameters.

    Inputs: x, c_0, and ``lengths``, ``reset`` and ``return_states`` as ``fastrnn.GRU`` has them.
        x: [T, B, I], [B, T, I] with batch_first, [T, I] without a batch, or a PackedSequence.
        c_0: [L*D, B, H], without B if x has none; zeros if left out.

    Outputs: y, c_n.
        y: [T, B, D*H], h of the last layer at every step, in the form of x; the two directions side by side.
        c_n: [L*D, B, H], the state after each row's last step; with ``return_states`` every c.

    Parameters of layer k, with the suffix ``_reverse`` for the second direction; blocks in the order u f r,
    and x where the input is not H wide.
        weight_ih_l{k}: [4*H, I], from the second layer on [4*H, D*H].
            Without the last block where the input is H wide.
        bias_ih_l{k}: [2*H], of f and r, with bias.
        All are drawn uniformly from [-1/sqrt(H), 1/sqrt(H)].

    Raises:
        ValueError: hidden_size or num_layers below 1, dropout outside [0, 1]; input that is neither 2-D nor
            3-D.
        RuntimeError: input or state of other sizes than above, or of another dtype than the parameters.

    Example:
        >>> import fastrnn, torch
        >>> sru = fastrnn.SRU(16, 16, num_layers=4, dropout=0.1)
        >>> y, c_n = sru(torch.randn(20, 3, 16))  # [T, B, I]
        >>> y.shape, c_n.shape
        (torch.Size([20, 3, 16]), torch.Size([4, 3, 16]))
    """

    _gates = 3

    def _shapes(self, width):
        H = self.hidden_size
        return ((3 if width == H else 4) * H, width), 2 * H

    def _output(self, x, weight, bias, rows, direction, scan):
        H = self.hidden_size
        if bias is not None:
            bias = pad(bias, (H, weight.shape[0] - 3 * H))
        u, f, r, *skipped = linear(x, weight, bias).split(H, -1)
        f, r = f.sigmoid(), r.sigmoid()
        c = scan(f, (1 - f) * u)
        return r * c.tanh() + (1 - r) * (skipped[0] if skipped else x)
