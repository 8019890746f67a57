"""The specification: every cell and the scan over time in plain torch operations, slow and readable.

The kernels are tested against this file in float64. Derivatives of it are torch's own, and what is derived
further than the kernels go (second derivatives, forward mode) is derived from it.

``T`` time, ``B`` batch, ``H`` hidden size, ``P`` width of h (the projection, or ``H``), ``G`` gates,
``U`` vectors of parameters, ``D`` directions, ``N`` rows of the whole sequence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _C  # noqa: F401  (registers cell_info)
from .rows import Rows
from .step_options import NO_OPTIONS, StepOptions

__all__ = ["CELLS", "Cell", "forward", "steps"]

# ---- The cells. A step maps (x [G], a [G], states, *u [U]) to the states; x is the input's part of each
# gate, a the recurrent part, states are h and what lives beside it, u are vectors of parameters. Options act
# inside it (StepOptions): ``candidate`` on what is about to be added to the state, ``updated`` on the new c.


def _same(t):
    return t


def lstm_step(x, a, states, *, candidate=_same, updated=_same):
    """Hochreiter and Schmidhuber (1997) with forget gates, Gers et al. (2000); torch.nn.LSTM's equations."""
    _, c = states
    i, f, o = (torch.sigmoid(x[k] + a[k]) for k in (0, 1, 3))
    g = torch.tanh(x[2] + a[2])
    c = updated(f * c + i * candidate(g))
    return o * torch.tanh(c), c


def lstm_peephole_step(x, a, states, w_ci, w_cf, w_co, *, candidate=_same, updated=_same):
    """Gers and Schmidhuber (2000): i and f see c_{t-1}, and o sees c_t."""
    _, c = states
    i, f = torch.sigmoid(x[0] + a[0] + w_ci * c), torch.sigmoid(x[1] + a[1] + w_cf * c)
    g = torch.tanh(x[2] + a[2])
    c = updated(f * c + i * candidate(g))
    return torch.sigmoid(x[3] + a[3] + w_co * c) * torch.tanh(c), c


def lstm_coupled_step(x, a, states, *, candidate=_same, updated=_same):
    """Greff et al. (2017), "CIFG": i = 1 - f, gates f, g, o."""
    _, c = states
    f, o = torch.sigmoid(x[0] + a[0]), torch.sigmoid(x[2] + a[2])
    c = updated(f * c + (1 - f) * candidate(torch.tanh(x[1] + a[1])))
    return o * torch.tanh(c), c


def gru_step(x, a, states, *, candidate=_same):
    """Cho et al. (2014), the reset gate after the product; torch.nn.GRU's equations."""
    (h,) = states
    r, z = torch.sigmoid(x[0] + a[0]), torch.sigmoid(x[1] + a[1])
    n = candidate(torch.tanh(x[2] + r * a[2]))
    return (n + z * (h - n),)


def rnn_tanh_step(x, a, states):
    """Elman (1990); torch.nn.RNN with nonlinearity='tanh'."""
    return (torch.tanh(x[0] + a[0]),)


def rnn_relu_step(x, a, states):
    """torch.nn.RNN with nonlinearity='relu'."""
    return (torch.relu(x[0] + a[0]),)


def _normed(v: Tensor, eps: Tensor | float = 1e-5, centred: bool = True) -> Tensor:
    """n(v) of torch.nn.LayerNorm, written out: torch's own third derivative of it is wrong,
    and so is what it derives from its tangent. Without the centre it is torch.nn.RMSNorm's."""
    if centred:
        v = v - v.mean(-1, keepdim=True)
    return v / torch.sqrt(v.square().mean(-1, keepdim=True) + eps)


def lstm_layer_norm_step(x, a, states, *vectors):
    """Ba et al. (2016), eq. 20-22. x holds gain_ih n(W_ih x) + b_ih; vectors: gain_hh and b_hh of each gate,
    gain_c, shift_c."""
    (_, c), gain, bias, (gain_c, shift_c) = states, vectors[:4], vectors[4:8], vectors[8:]
    n = _normed(torch.cat(a, -1)).split(c.shape[-1], -1)
    i, f, g, o = (x[k] + gain[k] * n[k] + bias[k] for k in range(4))
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(gain_c * _normed(c) + shift_c), c


def gru_layer_norm_step(x, a, states, *vectors):
    """``gru_step`` with layer normalisation of both products (Ba et al. 2016). x holds gain_ih n(W_ih x) +
    b_ih; vectors: gain_hh and b_hh of each gate."""
    n = _normed(torch.cat(a, -1)).split(a[0].shape[-1], -1)
    return gru_step(x, [vectors[k] * n[k] + vectors[3 + k] for k in range(3)], states)


def layer_norm_gru_step(x, a, states, *vectors, centred=True):
    """Hafner et al. (2020), the GRU of Dreamer's world model. vectors: gain and shift of each gate, and eps,
    whose mean is added to the variance."""
    (h,), (*_, eps) = states, vectors
    together = torch.cat([x[k] + a[k] for k in range(3)], -1)
    n = _normed(together, eps.mean(-1, keepdim=True), centred).split(h.shape[-1], -1)
    r, c, u = (vectors[k] * n[k] + vectors[3 + k] for k in range(3))
    u = torch.sigmoid(u - 1)
    return (u * torch.tanh(torch.sigmoid(r) * c) + (1 - u) * h,)


def rms_norm_gru_step(x, a, states, *vectors):
    """The same, where n divides by the root of the mean square (Zhang and Sennrich 2019)."""
    return layer_norm_gru_step(x, a, states, *vectors, centred=False)


def indrnn_tanh_step(x, a, states, u):
    """Li et al. (2018) with tanh: a unit sees its own state alone."""
    return (torch.tanh(x[0] + u * states[0]),)


def indrnn_relu_step(x, a, states, u):
    """Li et al. (2018) with relu."""
    return (torch.relu(x[0] + u * states[0]),)


def slstm_step(x, a, states):
    """Beck et al. (2024), xLSTM, with the empty state (n = 0) of its authors' code. There f and i are
    min(e^(log f + m_{t-1} - m), 1) and e^(i - m): the same as here, where infinite ones stay numbers."""
    _, c, n, m = states
    i, f, g, o = (x[k] + a[k] for k in range(4))
    past, empty, zero = torch.nn.functional.logsigmoid(f) + m, n == 0, torch.zeros_like(n)
    m = torch.where(empty, i, torch.maximum(past, i))
    f, i = torch.exp(torch.minimum(past - i, zero)), torch.exp(torch.minimum(i - past, zero))
    i = torch.where(empty, 1.0, i)
    c, n = f * c + i * torch.tanh(g), f * n + i
    return torch.sigmoid(o) * c / n, c, n, m


def lstm_hidden(saved, c):
    """h = o tanh(c), before a projection, from the kernels' gates [..., G*H], of which o is the last, and
    c [..., H]."""
    return saved[..., -c.shape[-1] :] * torch.tanh(c)


# What the operators take for each direction (csrc/common/operators.h).
W_IH, W_HH, B_IH, B_HH, W_HR, U, SLOTS = range(7)


@dataclass(frozen=True)
class Cell:
    """One row of the table of cells: its formulas, and the numbers that csrc/cells says of it."""

    step: Callable
    hidden: Callable | None  # for cells that can be projected
    gates: int  # G
    gradients: int  # E: gate gradients of a unit that the way back gives
    vectors: int  # U: vectors of parameters, [U, H]
    states: int  # h, and what lives beside it
    saved: int  # S: numbers of a unit that the kernels save for the way back
    reuses_saved: bool  # whether the gate gradients may be written over the saved numbers
    dense: bool  # h meets the matrix W_hh; else only what the step makes of it, and its ``a`` is None
    takes_gates: bool  # x holds the input's part of the gates [N, D*G*H]: there is no W_ih
    row_numbers: int  # R: numbers of a row that the kernels save after those of its units
    reads_after: int  # bit k: the way back reads state k of the step
    biases: int = 2  # of a module with biases: b_ih, b_hh

    @classmethod
    def of(cls, name: str, step: Callable, hidden: Callable | None = None, biases: int = 2) -> "Cell":
        *counts, reuses_saved, dense, takes_gates, numbers, after = torch.ops.fastrnn.cell_info(name)
        gates, gradients, vectors, states, saved = counts
        flags = bool(reuses_saved), bool(dense), bool(takes_gates)
        return cls(step, hidden, gates, gradients, vectors, states, saved, *flags, numbers, after, biases)

    @property
    def product_slots(self) -> tuple[int, ...]:
        """The slots of the weights whose gradients are products over all steps or sums."""
        if self.takes_gates:
            return (W_HH,)
        return (W_IH, W_HH, B_IH, B_HH) if self.dense else (W_IH, B_IH)


CELLS = {
    "lstm": Cell.of("lstm", lstm_step, lstm_hidden),
    "lstm_peephole": Cell.of("lstm_peephole", lstm_peephole_step, lstm_hidden),
    "lstm_layer_norm": Cell.of("lstm_layer_norm", lstm_layer_norm_step),
    "lstm_coupled": Cell.of("lstm_coupled", lstm_coupled_step, lstm_hidden),
    "gru": Cell.of("gru", gru_step),
    "rnn_tanh": Cell.of("rnn_tanh", rnn_tanh_step),
    "rnn_relu": Cell.of("rnn_relu", rnn_relu_step),
    "indrnn_tanh": Cell.of("indrnn_tanh", indrnn_tanh_step, biases=1),
    "indrnn_relu": Cell.of("indrnn_relu", indrnn_relu_step, biases=1),
    "slstm": Cell.of("slstm", slstm_step, biases=1),
    "gru_layer_norm": Cell.of("gru_layer_norm", gru_layer_norm_step),
    "layer_norm_gru": Cell.of("layer_norm_gru", layer_norm_gru_step, biases=1),
    "rms_norm_gru": Cell.of("rms_norm_gru", rms_norm_gru_step, biases=1),
}


# ---- The scan over time ------------------------------------------------------------------------------


def steps(
    cell: Cell,
    rows: Rows,
    direction: int,
    x,
    initial: Sequence[Tensor],
    weights: Sequence,
    options: StepOptions = NO_OPTIONS,
):
    """One direction, step by step: (each state of every step, in order of t with the rows of a step as
    ``rows.steps()`` has them, each state at the end [B, *]). initial: h0 [B, P] and the others [B, H];
    weights: the slots of this direction; options: those of the layer."""
    w_ih, w_hh, b_ih, b_hh, w_hr, u = weights
    GH = (w_hh if cell.takes_gates else w_ih).shape[0]
    H = GH // cell.gates
    places, order = rows.steps(), rows.order
    back = torch.argsort(order)
    vectors = () if u is None else u.unbind()
    gx = rows.without_padding(x)
    if cell.takes_gates:
        gx = gx[:, direction * GH : (direction + 1) * GH]
    else:
        gx = torch.nn.functional.linear(gx, w_ih, b_ih)
    now = [state[order] for state in initial]
    every: list[list] = [[None] * rows.T for _ in now]
    for t in range(rows.T) if direction == 0 else range(rows.T - 1, -1, -1):
        n = len(places[t])
        at = options.at(direction, t, places[t], order[:n])
        to = at.reset_to or (None,) * len(now)
        before = [rows.keep(places[t], state[:n], new) for state, new in zip(now, to, strict=True)]
        a = torch.nn.functional.linear(at.masked(before[0]), w_hh, b_hh).split(H, -1) if cell.dense else None
        gates, inside = gx[places[t]].split(H, -1), at.inside(cell.states)
        h, *others = cell.step(gates, a, before, *vectors, **inside)
        after = at.after(before, [h if w_hr is None else h @ w_hr.T, *others])
        shown = after
        if at.happens is not None:
            shown = [torch.where(at.happens, new, torch.zeros_like(new)) for new in after]
            after = [torch.where(at.happens, new, old[:n]) for new, old in zip(after, now, strict=True)]
        for states, state in zip(every, shown, strict=True):
            states[t] = state
        now = [torch.cat((new, old[n:])) for new, old in zip(after, now, strict=True)]
    return every, [state[back] for state in now]


def forward(
    cell: Cell,
    rows: Rows,
    x,
    states: Sequence[Tensor],
    weights: Sequence,
    options: StepOptions = NO_OPTIONS,
):
    """A layer: (y [N, D*P], the states at the end [D, B, *], every state beside h [D, N, H])."""
    directions = []
    for d in range(len(weights) // SLOTS):
        of_direction = weights[d * SLOTS : (d + 1) * SLOTS]
        every, last = steps(cell, rows, d, x, [state[d] for state in states], of_direction, options)
        directions.append(([rows.assemble(of_steps) for of_steps in every], last))
    history = [list(parts) for parts in zip(*(every for every, _ in directions), strict=True)]
    last = [torch.stack(parts) for parts in zip(*(last for _, last in directions), strict=True)]
    return torch.cat(history[0], -1), last, [torch.stack(parts) for parts in history[1:]]
