"""The specification: every cell and the scan over time in plain torch operations, slow and readable.

The kernels are tested against this file in float64. Derivatives of it are torch's own, and what is derived
further than the kernels go (second derivatives, forward mode) is derived from it.

``T`` time, ``B`` batch, ``H`` hidden size, ``P`` width of h (the projection, or ``H``), ``G`` gates,
``U`` vectors of parameters, ``D`` directions, ``N`` rows of the whole sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _C  # noqa: F401  (registers cell_info)

__all__ = ["CELLS", "Cell", "Layout", "forward", "steps"]

# ---- The cells. A step maps (x [G], a [G], h, c, *u [U]) to (h, c); x is the input's part of each gate, a
# the recurrent part, u are vectors of parameters.


def lstm_step(x, a, h, c):
    """Hochreiter and Schmidhuber (1997) with forget gates, Gers et al. (2000); torch.nn.LSTM's equations."""
    i, f, o = (torch.sigmoid(x[k] + a[k]) for k in (0, 1, 3))
    g = torch.tanh(x[2] + a[2])
    c = f * c + i * g
    return o * torch.tanh(c), c


def lstm_peephole_step(x, a, h, c, w_ci, w_cf, w_co):
    """Gers and Schmidhuber (2000): i and f see c_{t-1}, and o sees c_t."""
    i, f = torch.sigmoid(x[0] + a[0] + w_ci * c), torch.sigmoid(x[1] + a[1] + w_cf * c)
    g = torch.tanh(x[2] + a[2])
    c = f * c + i * g
    return torch.sigmoid(x[3] + a[3] + w_co * c) * torch.tanh(c), c


def gru_step(x, a, h, c):
    """Cho et al. (2014), the reset gate after the product; torch.nn.GRU's equations."""
    r, z = torch.sigmoid(x[0] + a[0]), torch.sigmoid(x[1] + a[1])
    n = torch.tanh(x[2] + r * a[2])
    return n + z * (h - n), None


def rnn_tanh_step(x, a, h, c):
    """Elman (1990); torch.nn.RNN with nonlinearity='tanh'."""
    return torch.tanh(x[0] + a[0]), None


def rnn_relu_step(x, a, h, c):
    """torch.nn.RNN with nonlinearity='relu'."""
    return torch.relu(x[0] + a[0]), None


def lstm_hidden(saved, c):
    """h = o tanh(c), before a projection, from the kernels' i, f, g, o [..., 4*H] and c [..., H]."""
    return saved[..., 3 * c.shape[-1] :] * torch.tanh(c)


@dataclass(frozen=True)
class Cell:
    """One row of the table of cells: its formulas, and the numbers that csrc/cells says of it."""

    step: Callable
    hidden: Callable | None  # for cells that can be projected
    gates: int  # G
    gradients: int  # E: gate gradients of a unit that the way back gives
    vectors: int  # U: vectors of parameters, [U, H]
    has_c: bool
    saved: int  # S: numbers of a unit that the kernels save for the way back
    in_place: bool  # whether the gate gradients may be written over the saved numbers

    @classmethod
    def of(cls, name: str, step: Callable, hidden: Callable | None = None) -> "Cell":
        gates, gradients, vectors, states, saved, reuses_saved = torch.ops.fastrnn.cell_info(name)
        return cls(step, hidden, gates, gradients, vectors, states > 1, saved, bool(reuses_saved))


CELLS = {
    "lstm": Cell.of("lstm", lstm_step, lstm_hidden),
    "lstm_peephole": Cell.of("lstm_peephole", lstm_peephole_step, lstm_hidden),
    "gru": Cell.of("gru", gru_step),
    "rnn_tanh": Cell.of("rnn_tanh", rnn_tanh_step),
    "rnn_relu": Cell.of("rnn_relu", rnn_relu_step),
}


# ---- The scan over time ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where the rows of each step lie among the N rows of a sequence. Inside a scan the batch is ordered by
    length, so that the rows of a step are always the first ones."""

    N: int
    B: int
    batch_first: bool
    batch_sizes: Tensor | None = None  # packed: int64 [T]
    lengths: Tensor | None = None  # dense: int64 [B]
    reset: Tensor | None = None  # bool [N]: the state is zeroed before this row

    @property
    def T(self) -> int:
        return len(self.batch_sizes) if self.batch_sizes is not None else self.N // max(self.B, 1)

    @property
    def order(self) -> Tensor:
        """The batch index of each row of a step, the longest first."""
        if self.lengths is None:
            return torch.arange(self.B, device="cpu")
        return torch.argsort(self.lengths, descending=True, stable=True)

    def steps(self) -> list[Tensor]:
        """The row numbers of each step."""
        if self.batch_sizes is not None:
            return list(torch.arange(self.N, device="cpu").split(self.batch_sizes.tolist()))
        batch, time = (self.T, 1) if self.batch_first else (1, self.B)
        alive = [self.B if self.lengths is None else int((self.lengths > t).sum()) for t in range(self.T)]
        return [t * time + self.order[:n] * batch for t, n in enumerate(alive)]

    def assemble(self, steps: list[Tensor]) -> Tensor:
        """The rows [N, *] from those of each step; zeros where no step has a row."""
        rows = torch.cat(self.steps())
        if len(rows) == self.N:
            return torch.cat(steps)[torch.argsort(rows)]
        values = torch.cat(steps)
        values = torch.cat((values, values.new_zeros(1, values.shape[1])))
        source = torch.full((self.N,), len(rows), device="cpu")
        source[rows] = torch.arange(len(rows), device="cpu")
        return values[source]

    def without_padding(self, rows: Tensor) -> Tensor:
        """[N, *] with zeros where no step has a row: 0 * NaN is NaN, so that a product over all rows would
        carry what stands there into the gradients of the weights."""
        if self.lengths is None:
            return rows
        t, b = torch.arange(self.T, device=self.lengths.device), self.lengths
        happens = t < b.unsqueeze(1) if self.batch_first else t.unsqueeze(1) < b
        happens = happens.flatten().to(rows.device).unsqueeze(1)
        return torch.where(happens, rows, torch.zeros_like(rows))

    def keep(self, rows: Tensor, state: Tensor) -> Tensor:
        """The state [n, *] before the given rows, zero where it is reset."""
        if self.reset is None:
            return state
        return torch.where(self.reset[rows].unsqueeze(1), torch.zeros_like(state), state)


def _blocks(v: Tensor, H: int) -> tuple[Tensor, ...]:
    return v.split(H, dim=-1)


def steps(cell: Cell, layout: Layout, direction: int, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, u):
    """One direction, step by step: (every h_t and every c_t, both in order of t with the rows of each step as
    ``layout.steps()`` has them, h_n [B, P], c_n [B, H]). h0 [B, P], c0 [B, H]; weights of this direction."""
    H = w_hh.shape[0] // cell.gates
    rows, order = layout.steps(), layout.order
    back = torch.argsort(order)
    vectors = () if u is None else u.unbind()
    gx = torch.nn.functional.linear(layout.without_padding(x), w_ih, b_ih)
    h, c = h0[order], c0[order] if cell.has_c else None
    hs, cs = [None] * layout.T, [None] * layout.T
    for t in range(layout.T) if direction == 0 else range(layout.T - 1, -1, -1):
        n = len(rows[t])
        h_prev = layout.keep(rows[t], h[:n])
        c_prev = layout.keep(rows[t], c[:n]) if cell.has_c else None
        a = torch.nn.functional.linear(h_prev, w_hh, b_hh)
        hs[t], cs[t] = cell.step(_blocks(gx[rows[t]], H), _blocks(a, H), h_prev, c_prev, *vectors)
        if w_hr is not None:
            hs[t] = hs[t] @ w_hr.T
        h = torch.cat((hs[t], h[n:]))
        c = torch.cat((cs[t], c[n:])) if cell.has_c else None
    return hs, cs, h[back], c[back] if cell.has_c else None


def forward(cell: Cell, layout: Layout, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, u):
    """A layer: (y [N, D*P], h_n [D, B, P], c_n [D, B, H], every c [D, N, H]); the last two None without c."""
    directions = []
    for d in range(len(w_hh)):
        weights = (part[d] if part else None for part in (w_ih, w_hh, b_ih, b_hh, w_hr, u))
        hs, cs, h_n, c_n = steps(cell, layout, d, x, h0[d], c0[d] if cell.has_c else None, *weights)
        directions.append((layout.assemble(hs), h_n, c_n, layout.assemble(cs) if cell.has_c else None))
    y, h_n, c_n, all_c = zip(*directions, strict=True)
    if not cell.has_c:
        return torch.cat(y, -1), torch.stack(h_n), None, None
    return torch.cat(y, -1), torch.stack(h_n), torch.stack(c_n), torch.stack(all_c)
