"""The specification: every cell and the scan over time in plain torch operations, slow and readable.

The kernels are tested against this file in float64, and it serves them where speed does not matter: second
derivatives and forward-mode differentiation are composed from it.

``T`` time, ``B`` batch, ``H`` hidden size, ``P`` width of h (the projection, or ``H``), ``G`` gates,
``S`` saved activations, ``E`` gate gradients, ``D`` directions, ``N`` rows of the whole sequence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CELLS", "Cell", "Layout", "backward", "forward"]

# ---- The cells. A step maps (x [G], a [G], h, c) to (h, c, saved [S]); x is the input's part of each gate,
# a the recurrent part. Its backward maps (saved, h, h_prev, c, c_prev, dh, dc) to (dgates [E], dh_prev, dc,
# dc_prev), where the last G of dgates belong to x, dh_prev is what does not pass through a, and dc is now
# complete.


def lstm_step(x, a, h, c):
    """Hochreiter and Schmidhuber (1997) with forget gates, Gers et al. (2000); torch.nn.LSTM's equations."""
    i, f, o = (torch.sigmoid(x[k] + a[k]) for k in (0, 1, 3))
    g = torch.tanh(x[2] + a[2])
    c = f * c + i * g
    return o * torch.tanh(c), c, (i, f, g, o)


def lstm_step_backward(saved, h, h_prev, c, c_prev, dh, dc, dsaved):
    i, f, g, o = saved
    tanh_c = torch.tanh(c)
    dc = dc + dh * o * (1 - tanh_c**2)
    di, df, dg, do = dc * g, dc * c_prev, dc * i, dh * tanh_c
    if dsaved is not None:
        di, df, dg, do = di + dsaved[0], df + dsaved[1], dg + dsaved[2], do + dsaved[3]
    dgates = (di * i * (1 - i), df * f * (1 - f), dg * (1 - g**2), do * o * (1 - o))
    return dgates, None, dc, dc * f


def gru_step(x, a, h, c):
    """Cho et al. (2014), the reset gate after the product; torch.nn.GRU's equations."""
    r, z = torch.sigmoid(x[0] + a[0]), torch.sigmoid(x[1] + a[1])
    n = torch.tanh(x[2] + r * a[2])
    return n + z * (h - n), None, (r, z, n, a[2])


def gru_step_backward(saved, h, h_prev, c, c_prev, dh, dc, dsaved):
    r, z, n, q = saved
    dn, dz = dh * (1 - z), dh * (h_prev - n)
    if dsaved is not None:
        dn, dz = dn + dsaved[2], dz + dsaved[1]
    dn = dn * (1 - n**2)
    dr, dq = dn * q, dn * r
    if dsaved is not None:
        dr, dq = dr + dsaved[0], dq + dsaved[3]
    return (dq, dr * r * (1 - r), dz * z * (1 - z), dn), dh * z, None, None


def rnn_tanh_step(x, a, h, c):
    """Elman (1990); torch.nn.RNN with nonlinearity='tanh'."""
    return torch.tanh(x[0] + a[0]), None, ()


def rnn_tanh_step_backward(saved, h, h_prev, c, c_prev, dh, dc, dsaved):
    return (dh * (1 - h**2),), None, None, None


def rnn_relu_step(x, a, h, c):
    """torch.nn.RNN with nonlinearity='relu'."""
    return torch.relu(x[0] + a[0]), None, ()


def rnn_relu_step_backward(saved, h, h_prev, c, c_prev, dh, dc, dsaved):
    return (torch.where(h <= 0, torch.zeros_like(dh), dh),), None, None, None


@dataclass(frozen=True)
class Cell:
    """One row of the table of cells; ``csrc/cells`` has the same numbers."""

    step: Callable
    step_backward: Callable
    gates: int  # G
    saved: int  # S
    gradients: int  # E
    has_c: bool

    @property
    def in_place(self) -> bool:
        """Whether the gate gradients fit where the saved activations lie."""
        return self.saved == self.gradients


CELLS = {
    "lstm": Cell(lstm_step, lstm_step_backward, gates=4, saved=4, gradients=4, has_c=True),
    "gru": Cell(gru_step, gru_step_backward, gates=3, saved=4, gradients=4, has_c=False),
    "rnn_tanh": Cell(rnn_tanh_step, rnn_tanh_step_backward, 1, 0, 1, has_c=False),
    "rnn_relu": Cell(rnn_relu_step, rnn_relu_step_backward, 1, 0, 1, has_c=False),
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
            return torch.arange(self.B)
        return torch.argsort(self.lengths, descending=True, stable=True)

    def steps(self) -> list[Tensor]:
        """The row numbers of each step."""
        if self.batch_sizes is not None:
            return list(torch.arange(self.N).split(self.batch_sizes.tolist()))
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
        source = torch.full((self.N,), len(rows))
        source[rows] = torch.arange(len(rows))
        return values[source]

    def keep(self, rows: Tensor, state: Tensor) -> Tensor:
        """The state [n, *] before the given rows, zero where it is reset."""
        if self.reset is None:
            return state
        return torch.where(self.reset[rows].unsqueeze(1), torch.zeros_like(state), state)


def _blocks(v: Tensor, H: int) -> tuple[Tensor, ...]:
    return v.split(H, dim=-1)


def _order(direction: int, T: int) -> range:
    return range(T) if direction == 0 else range(T - 1, -1, -1)


def _join(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat(tuple(parts), -1) if parts else like[..., :0]


def forward(cell: Cell, layout: Layout, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr):
    """The operator ``fastrnn::<cell>``; shapes as in csrc/ops.cpp."""
    H = w_hh[0].shape[0] // cell.gates
    steps, order = layout.steps(), layout.order
    back = torch.argsort(order)
    y, h_n, c_n, saved, saved_c = [], [], [], [], []
    for d in range(len(w_hh)):
        gx = torch.nn.functional.linear(x, w_ih[d], b_ih[d] if b_ih else None)
        h, c = h0[d][order], c0[d][order] if cell.has_c else None
        ys, saves, cs = ([None] * layout.T for _ in range(3))
        for t in _order(d, layout.T):
            rows = steps[t]
            n = len(rows)
            h_prev = layout.keep(rows, h[:n])
            c_prev = layout.keep(rows, c[:n]) if cell.has_c else None
            a = torch.nn.functional.linear(h_prev, w_hh[d], b_hh[d] if b_hh else None)
            new_h, new_c, save = cell.step(_blocks(gx[rows], H), _blocks(a, H), h_prev, c_prev)
            ys[t] = new_h @ w_hr[d].T if w_hr else new_h
            saves[t], cs[t] = _join(save, new_h), new_c
            h = torch.cat((ys[t], h[n:]))
            c = torch.cat((new_c, c[n:])) if cell.has_c else None
        y.append(layout.assemble(ys))
        h_n.append(h[back])
        saved.append(layout.assemble(saves))
        if cell.has_c:
            c_n.append(c[back])
            saved_c.append(layout.assemble(cs))
    none = h0.new_empty(0)
    return (
        torch.cat(y, -1),
        torch.stack(h_n),
        torch.stack(c_n) if cell.has_c else none,
        torch.stack(saved),
        torch.stack(saved_c) if cell.has_c else none,
    )


def backward(
    cell: Cell, layout: Layout, dy, dh_n, dc_n, dsaved, dsaved_c, saved, saved_c, y, h0, c0, w_hh, w_hr, keep
):
    """The operator ``fastrnn::<cell>_backward``; shapes as in csrc/ops.cpp."""
    D, _, P = h0.shape
    H = w_hh[0].shape[0] // cell.gates
    steps, batch = layout.steps(), layout.order
    back = torch.argsort(batch)
    all_dgates, dh0, dc0, all_dh, all_dc = [], [], [], [], []
    for d in range(D):
        y_d = y[:, d * P : (d + 1) * P]
        dh = dh_n[d][batch] if dh_n is not None else torch.zeros_like(h0[d])
        dc = None
        if cell.has_c:
            dc = dc_n[d][batch] if dc_n is not None else torch.zeros_like(c0[d])
        dgates, dhs, dcs = ([None] * layout.T for _ in range(3))
        order = list(_order(d, layout.T))
        for s in reversed(range(layout.T)):
            t = order[s]
            rows = steps[t]
            n = len(rows)

            def previous(values, initial, s=s, rows=rows, order=order):
                state = initial[batch][: len(rows)]
                if s > 0:
                    before = values[steps[order[s - 1]][: len(rows)]]
                    state = torch.cat((before, state[len(before) :]))
                return layout.keep(rows, state)

            dh_t = dh[:n] + dy[rows][:, d * P : (d + 1) * P] if dy is not None else dh[:n]
            dhs[t] = dh_t
            c = c_prev = dc_t = None
            if cell.has_c:
                c, c_prev = saved_c[d][rows], previous(saved_c[d], c0[d])
                dc_t = dc[:n] + dsaved_c[d][rows] if dsaved_c is not None else dc[:n]
            dgate, direct, dcs[t], dc_prev = cell.step_backward(
                _blocks(saved[d][rows], H),
                y_d[rows],
                previous(y_d, h0[d]),
                c,
                c_prev,
                dh_t @ w_hr[d] if w_hr else dh_t,
                dc_t,
                _blocks(dsaved[d][rows], H) if dsaved is not None and cell.saved else None,
            )
            dgates[t] = torch.cat(dgate, -1)
            dh_prev = recurrent_gradients(cell, dgates[t]) @ w_hh[d]
            if direct is not None:
                dh_prev = dh_prev + direct
            dh = torch.cat((layout.keep(rows, dh_prev), dh[n:]))
            dc = torch.cat((layout.keep(rows, dc_prev), dc[n:])) if cell.has_c else None
        all_dgates.append(layout.assemble(dgates))
        all_dh.append(layout.assemble(dhs))
        dh0.append(dh[back])
        if cell.has_c:
            all_dc.append(layout.assemble(dcs))
            dc0.append(dc[back])
    none = h0.new_empty(0)
    return (
        torch.stack(all_dgates),
        torch.stack(dh0),
        torch.stack(dc0) if cell.has_c else none,
        torch.stack(all_dh) if w_hr or keep else none,
        torch.stack(all_dc) if cell.has_c and keep else none,
    )


def input_gradients(cell: Cell, dgates: Tensor) -> Tensor:
    """The part of dgates [N, E*H] that belongs to the input's gates [N, G*H]: its last G blocks."""
    H = dgates.shape[-1] // cell.gradients
    return dgates[..., (cell.gradients - cell.gates) * H :]


def recurrent_gradients(cell: Cell, dgates: Tensor) -> Tensor:
    """The part of dgates [N, E*H] that belongs to the recurrent gates, in the order of W_hh [G*H, P]."""
    H = dgates.shape[-1] // cell.gradients
    first = dgates[..., : cell.gates * H]
    # Where x and the recurrent product have different gradients (GRU's last gate), the recurrent one stands
    # first in dgates; here it goes back to the end.
    return first if cell.gradients == cell.gates else first.roll(-H, -1)
