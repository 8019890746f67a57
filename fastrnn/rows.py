"""A sequence is rows: how the rows [N, *] of a call lie, and which of them take part in which step."""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Rows", "put", "take"]

Where = slice | Tensor  # which rows


def take(rows: Tensor, where: Where) -> Tensor:
    return rows[where] if isinstance(where, slice) else rows.index_select(0, where)


def put(rows: Tensor, where: Where, values: Tensor) -> None:
    if isinstance(where, slice):
        rows[where] = values
    else:
        rows.index_copy_(0, where, values)


class Rows(NamedTuple):
    """T steps of B sequences as rows [N, *]: dense [T, B] or [B, T], or packed."""

    T: int
    B: int
    batch_first: bool = False
    batch_sizes: Tensor | None = None  # packed: int64 [T] on the CPU
    lengths: Tensor | None = None  # dense: int64 [B] on the CPU
    reset: Tensor | None = None  # bool [N]: the state is zeroed before this row

    @classmethod
    def of(cls, N: int, B: int, batch_first: bool, batch_sizes, lengths, reset) -> "Rows":
        """From the number of rows, which says how many steps there are."""
        T = N // max(B, 1) if batch_sizes is None else len(batch_sizes)
        return cls(T, B, batch_first, batch_sizes, lengths, reset)

    @property
    def N(self) -> int:
        return self.T * self.B if self.batch_sizes is None else int(self.batch_sizes.sum())

    # ---- Dense shapes

    def dense(self, rows: Tensor) -> Tensor:
        """[N, *] -> [T, B, *] or [B, T, *]."""
        shape = (self.B, self.T) if self.batch_first else (self.T, self.B)
        return rows.view(*shape, *rows.shape[1:])

    def states(self, rows: Tensor) -> Tensor:
        """[N, D, *] -> [T, D, B, *]: what hx takes, for every step."""
        steps = self.dense(rows)
        return steps.permute(1, 2, 0, 3) if self.batch_first else steps.transpose(1, 2)

    def of_states(self, states: Tensor) -> Tensor:
        """[T, D, B, *] -> [N, D, *]."""
        return states.permute(*((2, 0) if self.batch_first else (0, 2)), 1, 3).flatten(0, 1)

    # ---- Which row is which

    def places(self) -> tuple[Tensor, Tensor]:
        """The step of each row and its batch index (packed: its rank by length), both [N] on the CPU."""
        if self.batch_sizes is not None:
            sizes, device = self.batch_sizes, self.batch_sizes.device
            N, first = int(sizes.sum()), sizes.cumsum(0) - sizes
            t = torch.repeat_interleave(torch.arange(self.T, device=device), sizes, output_size=N)
            return t, torch.arange(N, device=device) - first[t]
        t, b = torch.meshgrid(
            torch.arange(self.T, device="cpu"), torch.arange(self.B, device="cpu"), indexing="ij"
        )
        return (t.T.flatten(), b.T.flatten()) if self.batch_first else (t.flatten(), b.flatten())

    def ends(self) -> Tensor:
        """The number of steps of each batch index [B], on the CPU."""
        if self.batch_sizes is not None:
            return (self.batch_sizes[:, None] > torch.arange(self.B, device=self.batch_sizes.device)).sum(0)
        return torch.full((self.B,), self.T, device="cpu") if self.lengths is None else self.lengths

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

    # ---- Rows from rows

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
        return torch.where(self.happens(rows.device).unsqueeze(1), rows, torch.zeros_like(rows))

    def happens(self, device: torch.device) -> Tensor:
        """Whether a row [N] with lengths belongs to a step, or to the padding."""
        assert self.lengths is not None
        t, b = torch.arange(self.T, device=self.lengths.device), self.lengths
        return (
            (t < b.unsqueeze(1) if self.batch_first else t.unsqueeze(1) < b)
            .flatten()
            .to(device, non_blocking=True)
        )

    def keep(self, rows: Tensor, state: Tensor, to: Tensor | None = None) -> Tensor:
        """The state [n, *] before the given rows, where it is reset zero or ``to`` [n, *]."""
        if self.reset is None:
            return state
        to = torch.zeros_like(state) if to is None else to
        return torch.where(self.reset[rows].unsqueeze(1), to, state)

    def reversed(self, rows: Tensor) -> Tensor:
        """The rows [N, *] with the steps of each batch index from its last to its first. Padding stays where
        it is, and reversing twice changes nothing."""
        if self.batch_sizes is None and self.lengths is None:
            return self.dense(rows).flip(1 if self.batch_first else 0).flatten(0, 1)
        ends = self.ends()
        t, b = (places.to(ends.device) for places in self.places())  # lengths may be on meta
        ends = ends[b]
        t = torch.where(t < ends, ends - 1 - t, t)
        if self.batch_sizes is not None:
            first = self.batch_sizes.cumsum(0) - self.batch_sizes
            index = first[t] + b
        else:
            index = b * self.T + t if self.batch_first else t * self.B + b
        return rows.index_select(0, index.to(rows.device, non_blocking=True))

    def segments(self, k: int, direction: int, device: torch.device) -> list[tuple["Rows", Where]]:
        """Every k steps of a direction from its own start, as time-major rows of one that runs forwards, and
        where these lie in [N, *]."""
        numbers = None
        if direction == 1 or self.batch_first:
            numbers = torch.arange(self.N, device=device)
            numbers = self.reversed(numbers) if direction == 1 else numbers
            numbers = self.dense(numbers).T.flatten() if self.batch_first else numbers
        sizes, found, a = self.batch_sizes, [], 0
        for begin in range(0, self.T, k):
            T = min(k, self.T - begin)
            own = None if sizes is None else sizes[begin : begin + T]
            B = self.B if own is None else int(own[0])
            b = a + (T * B if own is None else int(own.sum()))
            where: Where = slice(a, b) if numbers is None else numbers[a:b]
            lengths = None if self.lengths is None else (self.lengths - begin).clamp(0, T)
            reset = None if self.reset is None else take(self.reset, where)
            found.append((Rows(T, B, False, own, lengths, reset), where))
            a = b
        return found

    def of_batch(self, t: Tensor) -> Tensor:
        """[B, *] -> [N, *], the same in every step."""
        if self.batch_sizes is not None:
            return t[self.places()[1].to(t.device, non_blocking=True)]
        return t.repeat_interleave(self.T, 0) if self.batch_first else t.repeat(self.T, *[1] * (t.dim() - 1))

    def previous(self, y: Tensor, h0: Tensor, direction: int, to: Tensor | None = None) -> Tensor:
        """h_{t-1} of every row: y [N, P] one step later, h0 [B, P] where a row begins, after a reset zero or
        ``to``, [T, B, P] or [B, P]."""
        if self.B == 0:
            return y
        if self.batch_sizes is not None:
            before = torch.cat((h0, y))[self._previous_index(direction).to(y.device, non_blocking=True)]
        else:
            dim, T = 1 if self.batch_first else 0, self.T
            steps = self.dense(y)
            if direction == 0:
                parts = (h0.unsqueeze(dim), steps.narrow(dim, 0, T - 1))
            else:
                parts = (steps.narrow(dim, 1, T - 1), h0.unsqueeze(dim))
            shifted = torch.cat(parts, dim)
            if direction == 1 and self.lengths is not None:
                t = torch.arange(T, device=self.lengths.device).unsqueeze(1 - dim)
                last = t == (self.lengths - 1).unsqueeze(dim)
                shifted = torch.where(
                    last.unsqueeze(-1).to(y.device, non_blocking=True), h0.unsqueeze(dim), shifted
                )
            before = shifted.flatten(0, 1)
        if self.reset is None:
            return before
        if to is None:
            to = torch.zeros_like(before)
        else:
            to = self.of_batch(to) if to.dim() == 2 else self.of_states(to.unsqueeze(1)).squeeze(1)
        return torch.where(self.reset.unsqueeze(1), to, before)

    def _previous_index(self, direction: int) -> Tensor:
        """For each packed row, where its previous one lies in (h0, y)."""
        assert self.batch_sizes is not None
        first = self.batch_sizes.cumsum(0) - self.batch_sizes
        t, b = self.places()
        before = t - 1 if direction == 0 else t + 1
        inside = before.clamp(0, self.T - 1)
        exists = (before == inside) & (b < self.batch_sizes[inside])
        return torch.where(exists, self.B + first[inside] + b, b)
