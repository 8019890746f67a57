"""Random arguments for the operators, and the reference's answers in float64."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import way_back
from torch import Tensor

from fastrnn import _operators
from fastrnn.reference import CELLS
from fastrnn.rows import Rows

CELL_NAMES = list(CELLS)
# One of each kind that the drivers tell apart, for the largest sweeps: others differ in their formulas alone.
KINDS = ["lstm", "lstm_layer_norm", "gru", "gru_layer_norm", "rnn_tanh", "indrnn_tanh", "slstm"]


@dataclass
class Scan:
    """The arguments of one operator call: T steps of B rows in D directions."""

    name: str
    x: Tensor  # [N, I]
    h0: Tensor  # [D, B, P]
    c0: Tensor | None  # [D, B, H], of cells with further states all those beside h, side by side
    w_ih: list[Tensor]  # D x [G*H, I]
    w_hh: list[Tensor]  # D x [G*H, P]
    b_ih: list[Tensor]  # D x [G*H] or none
    b_hh: list[Tensor]  # D x [G*H] or none
    w_hr: list[Tensor]  # D x [P, H] or none
    u: list[Tensor]  # D x [U, H] or none
    batch_sizes: Tensor | None  # packed: [T]
    lengths: Tensor | None  # dense: [B]
    reset: Tensor | None  # [N]
    batch_first: bool

    @property
    def layout(self) -> Rows:
        B = self.h0.shape[1]
        return Rows.of(self.x.shape[0], B, self.batch_first, self.batch_sizes, self.lengths, self.reset)

    def map(self, f) -> "Scan":
        """f on every tensor of numbers."""
        return replace(
            self,
            x=f(self.x),
            h0=f(self.h0),
            c0=None if self.c0 is None else f(self.c0),
            **{name: [f(t) for t in getattr(self, name)] for name in self.WEIGHTS},
        )

    def to(self, device: str, dtype: torch.dtype) -> "Scan":
        moved = self.map(lambda t: t.to(device, dtype))
        return replace(moved, reset=None if self.reset is None else self.reset.to(device))

    WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr", "u")

    @property
    def weights(self) -> list[list[Tensor]]:
        return [getattr(self, name) for name in self.WEIGHTS]

    @property
    def rows(self) -> tuple:
        return (self.batch_sizes, self.lengths, self.reset, self.batch_first)

    @property
    def states(self) -> list[Tensor]:
        return [self.h0, *self._apart(self.c0)]

    def _apart(self, c: Tensor | None) -> list:
        """The states beside h, or their gradients."""
        others = CELLS[self.name].states - 1
        return list(c.chunk(others, -1)) if others and c is not None else [None] * others

    @property
    def slots(self) -> list[Tensor | None]:
        """The weights as the operators take them: one direction after the other."""
        return [
            part[d] if part else None for d in range(len(self.w_ih or self.w_hh)) for part in self.weights
        ]

    def arguments(self, save: int = 1, packed: Tensor | None = None) -> tuple:
        given = _operators.given(self.slots if packed is None else [])
        return (self.name, self.x, self.states, *given, packed, *self.rows, save)

    def options(self, stepwise: bool = False, seed: int = 3) -> tuple:
        """Masks and states of a reset, [T, D, B, *] or the same at every step: all that the cell takes. None
        for reset_to where nothing is reset."""
        g, (D, B, P), N = torch.Generator().manual_seed(seed), self.h0.shape, self.x.shape[0]
        H = self.states[-1].shape[2]
        keeps = [torch.rand(D, N, width, generator=g) < 0.3 for width in (P, H)[: len(self.states)]]
        factors = [2.0 * (torch.rand(*shape, generator=g) < 0.5) for shape in ((D, N, H), (D, B, P))]
        candidate, recurrent = (t.to(self.x.dtype) for t in factors)
        masks = (
            *(*keeps, None)[:2],
            candidate if "candidate" in (CELLS[self.name].step.__kwdefaults__ or {}) else None,
            recurrent if CELLS[self.name].dense else None,
        )
        T = [self.layout.T] if stepwise else []
        to = [torch.randn(*T, *state.shape, generator=g, dtype=state.dtype) for state in self.states]
        return masks, [None] * len(to) if self.reset is None else to

    def each_step(self, y: Tensor, history: Tensor) -> Iterator[tuple[int, Tensor, "Scan"]]:
        """For each step of a dense time-major scan: its direction, its h [B, P], and a scan of it alone from
        the states before it. history: every state beside h, side by side, as ``kernel`` has them."""
        D, B, P = self.h0.shape
        T = len(self.x) // B
        others = [t.view(D, T, B, -1) for t in self._apart(history)] if history.numel() else []
        every = [y.view(T, B, D, P).permute(2, 0, 1, 3), *others]
        for d in range(D):
            for t in range(T):
                s = t - 1 if d == 0 else t + 1
                h0, *c0 = (
                    st if not 0 <= s < T else e[:, s] for st, e in zip(self.states, every, strict=True)
                )
                x = self.x.view(T, B, -1)[t]
                yield d, every[0][d, t], replace(self, x=x, h0=h0, c0=torch.cat(c0, -1) if c0 else None)

    # The results of the operators in one row: y, h_n, c_n, saved, every c; [0] in the place of those that are
    # missing. The states beside h stand side by side.

    def kernel(
        self, save: int = 1, packed: Tensor | None = None, operators=torch.ops.fastrnn
    ) -> tuple[Tensor, ...]:
        y, last, history, saved = operators.scan(*self.arguments(save, packed))
        return y, last[0], _joined(last[1:], y), *(saved or [y.new_empty(0)]), _joined(history, y)

    def reference(self) -> tuple[Tensor, ...]:
        return way_back.forward(self.name, self.layout, self.x, self.states, self.slots)

    def backward_arguments(self, outputs: tuple, gradients: tuple, keep: bool = True) -> tuple:
        """outputs are those of the forward scan, gradients theirs (None: not wanted)."""
        y, _, _, saved, saved_c = outputs
        dy, dh_n, dc_n, _, dall_c = gradients
        saves = CELLS[self.name].saved > 0
        return (
            self.name, dy, [dh_n, *self._apart(dc_n)], self._apart(dall_c), y,
            self._apart(saved_c), saved if saves else None, self.states, *_operators.given(self.slots),
            *self.rows, keep,
        )  # fmt: skip

    def kernel_backward(
        self, outputs: tuple, gradients: tuple, keep: bool = True, operators=torch.ops.fastrnn
    ) -> tuple[Tensor, ...]:
        """dgates, dh0, dc0, dL/dh_t, dL/dc_t and du [D, U, H]."""
        dgates, *others = operators.scan_backward.default(*self.backward_arguments(outputs, gradients, keep))
        return dgates, *self._in_a_row(*others)

    def _in_a_row(self, dstates: list, complete: list, du: list) -> tuple[Tensor, ...]:
        dh0, none = dstates[0], dstates[0].new_empty(0)
        dc0, dh, dc = _joined(dstates[1:], dh0), _joined(complete[:1], dh0), _joined(complete[1:], dh0)
        return dh0, dc0, dh, dc, torch.stack(du) if du else none

    def kernel_backward_in_place(
        self, outputs: tuple, gradients: tuple, keep: bool = True, operators=torch.ops.fastrnn
    ) -> tuple:
        """The same, from a copy of the saved activations that the gate gradients are written over."""
        outputs = (*outputs[:3], outputs[3].clone(), outputs[4])
        others = operators.scan_backward.over(*self.backward_arguments(outputs, gradients, keep))
        return outputs[3], *self._in_a_row(*others)

    def reference_backward(self, outputs: tuple, gradients: tuple, keep: bool = True) -> tuple[Tensor, ...]:
        y, _, _, saved, all_c = outputs
        dy, dh_n, dc_n, _, dall_c = gradients
        return way_back.backward(
            self.name, self.layout, dy, dh_n, dc_n, dall_c, saved, all_c, y, self.h0, self.c0, self.w_hh,
            self.w_hr, self.u, keep,
        )  # fmt: skip

    def gradients(self, outputs: tuple, wanted: str = "all", seed: int = 1) -> tuple:
        """Random gradients of y, h_n, c_n and every c (saved has none); ``wanted`` is a key of ``kept``."""
        g = torch.Generator().manual_seed(seed)
        made = [
            torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.dtype) if o.dim() > 1 else None
            for o in outputs
        ]
        kept = {"all": (0, 1, 2, 4), "first": (0, 1, 2), "y": (0,), "h": (1,), "c": (2,), "all_c": (4,)}
        return tuple(m if i in kept[wanted] else None for i, m in enumerate(made))


def _joined(states: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(states, -1) if states else like.new_empty(0)


FORMS = {
    "time_major": {},
    "batch_first": {"batch_first": True},
    "packed": {"packed": True},
    "lengths": {"lengths": True},
    "lengths_batch_first": {"lengths": True, "batch_first": True, "reset": True},
    "reset": {"reset": True},
    "packed_reset": {"packed": True, "reset": True},
}


def make_scan(
    name: str, T: int, B: int, H: int, *, D: int = 1, P: int | None = None, I: int = 3, bias: bool = True,
    batch_first: bool = False, packed: bool = False, lengths: bool = False, reset: bool = False,
    dtype=torch.float64, seed: int = 0,
) -> Scan:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    cell = CELLS[name]

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=g, dtype=torch.float64)

    N, width, bound, batch_sizes, given = T * B, P or H, H**-0.5, None, None
    if packed:
        long = torch.randint(1, T + 1, (B,), generator=g)
        long[0] = T
        batch_sizes = (torch.arange(T)[:, None] < long).sum(1)
        N = int(batch_sizes.sum())
    if lengths:
        given = torch.randint(0, T + 1, (B,), generator=g)  # in any order, and some of no length
    scan = Scan(
        name,
        normal(N, D * cell.gates * H if cell.takes_gates else I),
        normal(D, B, width),
        normal(D, B, (cell.states - 1) * H) if cell.states > 1 else None,
        [] if cell.takes_gates else [normal(cell.gates * H, I) for _ in range(D)],
        [normal(cell.gates * H, width, scale=bound) for _ in range(D)] if cell.dense else [],
        [normal(cell.gates * H, scale=bound) for _ in range(D)] if bias and not cell.takes_gates else [],
        [normal(cell.gates * H, scale=bound) for _ in range(D)]
        if bias and cell.dense and not cell.takes_gates
        else [],
        [normal(P, H, scale=bound) for _ in range(D)] if P else [],
        [normal(cell.vectors, H) for _ in range(D)] if cell.vectors else [],
        batch_sizes,
        given,
        torch.rand(N, generator=g) < 0.3 if reset else None,
        batch_first,
    )
    if name == "slstm":  # n is a sum of weights, of which the largest was 1
        scan.c0[..., H : 2 * H].abs_().add_(1)
    if name in ("layer_norm_gru", "rms_norm_gru"):  # eps is added under a root
        for u in scan.u:
            u[-1].abs_()
    return scan.map(lambda t: t.to(dtype))
