"""Truncated back-propagation through time: a sampler of chunks, and a carrier of the hidden state.

Every k1 steps the gradient of the last k1 losses goes back through at most k2 steps: BPTT(k2; k1)
of Williams and Peng, "An efficient gradient-based algorithm for on-line training of recurrent
network trajectories", Neural Computation 2 (1990). k1 = k2 is the usual contiguous chunk.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastrnn.training.data.batches import IGNORE, Batches, StreamBatch
from fastrnn.training.errors import InputError, check_whole

State = Any  # h [L*D, B, P], or (h, c [L*D, B, H])


def map_state(f: Callable[[Tensor], Tensor], state: State) -> State:
    """f of each tensor of a state; None stays None."""
    if state is None:
        return None
    return tuple(map(f, state)) if isinstance(state, tuple) else f(state)


class StreamChunks(Batches):
    """Documents laid end to end, cut into parallel rows, given out in contiguous chunks.

    Chunk i covers the steps [i k1, i k1 + k2) of every row. With k2 > k1 chunks overlap, and the
    overlap has no targets again, so each symbol is a target once an epoch. A row's first step and
    each document's first symbol are marked in ``reset``; the last symbol of a document has no
    target.

    Args:
        documents: each int64 [N].
        rows: parallel streams B, over all processes; each process gets its own rows.
        k1: steps between updates.
        k2: steps that a gradient goes back; k1 when left out.

    Raises:
        InputError: rows or k1 below 1, k2 below k1, or documents too short for so many rows.
    """

    def __init__(
        self,
        documents: list[Tensor],
        rows: int,
        k1: int,
        k2: int | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__(rank, world)
        self.rows, self.k1, self.k2 = rows, k1, k1 if k2 is None else k2
        check_whole("rows", rows)
        if not 1 <= self.k1 <= self.k2:
            raise InputError(f"k1 must be from 1 to k2, got k1={self.k1}, k2={self.k2}")
        if rows % world:
            raise InputError(f"rows must be divisible by the {world} processes, got {rows}")
        documents = [d for d in documents if len(d) > 1]
        total = sum(map(len, documents))
        self.length = total // rows  # steps of a row
        if self.length < 1:
            raise InputError(f"text of {total} symbols is too short for {rows} parallel rows")
        x = torch.cat(documents)
        y = torch.cat([torch.cat([d[1:], d.new_full((1,), IGNORE)]) for d in documents])
        reset = torch.cat([torch.arange(len(d)) == 0 for d in documents])
        mine = slice(rank * rows // world, (rank + 1) * rows // world)
        self.symbols = len(x)
        self.x, self.y, self.reset = (self._rows(v)[:, mine] for v in (x, y, reset))
        self.reset[0] = True
        self.targets = (self._rows(y) != IGNORE).sum(1)  # [length], over all processes

    def decisive(self) -> dict[str, Any]:
        return {"rows": self.rows, "k1": self.k1, "symbols": self.symbols}

    def _rows(self, stream: Tensor) -> Tensor:  # [length, rows]
        return stream[: self.length * self.rows].view(self.rows, self.length).t().contiguous()

    def __len__(self) -> int:
        return 1 + max(0, -(-(self.length - self.k2) // self.k1))

    def batch(self, epoch: int, index: int) -> StreamBatch:
        start = index * self.k1
        steps = slice(start, start + self.k2)
        seen = self.k2 - self.k1 if index else 0  # steps whose targets the last chunks had
        y = self.y[steps].clone()
        y[:seen] = IGNORE
        everyone = int(self.targets[steps][seen:].sum())
        return StreamBatch(
            x=self.x[steps],
            y=y,
            reset=self.reset[steps],
            keep=min(self.k1, len(y)),
            weight=int((y != IGNORE).sum()) * self.world / max(1, everyone),
        )


def scan(rnn: nn.Module, x: Tensor, state: State, reset: Tensor) -> tuple[Tensor, State]:
    """Run a time-major recurrent module, with the state of marked rows zeroed on the way.

    Args:
        rnn: any module called as ``y, state = rnn(x, state)``.
        x: [T, B, I].
        state: before the first step; None is zero.
        reset: bool [T, B]: before this step the row's state becomes zero. On the CPU it is read at once;
            elsewhere the host waits for it.

    Returns:
        y [T, B, P] and the state after the last step.
    """
    cuts = reset.any(1).nonzero().flatten().tolist()
    outputs = []
    for start, end in pairwise(sorted({0, *cuts, len(x)})):
        if start in cuts and state is not None:
            fresh = reset[start].view(1, -1, 1).to(x.device, non_blocking=True)
            state = map_state(partial(Tensor.masked_fill, mask=fresh, value=0.0), state)
        y, state = rnn(x[start:end], state)
        outputs.append(y)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs), state


class StateCarrier:
    """The hidden state between chunks: kept, detached, reset at marks, saved with the checkpoint.

    ``y = carrier(rnn, x, reset, keep)`` in any loop; ``carrier.state`` is the state that the next
    chunk begins with, or None. With several processes each carries the state of its own rows.
    """

    def __init__(self) -> None:
        self.state: State = None

    def __call__(self, rnn: nn.Module, x: Tensor, reset: Tensor, keep: int) -> Tensor:
        """y [T, B, P] of a chunk; hands on the detached state after ``keep`` steps."""
        y, state = scan(rnn, x[:keep], self.state, reset[:keep])
        self.state = map_state(Tensor.detach, state)
        if keep == len(x):
            return y
        rest, _ = scan(rnn, x[keep:], state, reset[keep:])
        return torch.cat([y, rest])

    def gathered(self) -> State:
        """The state of all processes' rows, for a checkpoint; every process must call it."""
        return map_state(lambda s: torch.cat(all_gather(s.contiguous()), dim=1), self.state)

    def scatter(self, state: State, rank: int, world: int) -> None:
        """Take this process's rows of a gathered state."""
        self.state = map_state(lambda s: s.chunk(world, dim=1)[rank].contiguous(), state)


def all_gather(value: Tensor) -> list[Tensor]:
    """The tensors of all processes, in rank order; of this one alone without a process group."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return [value]
    parts = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, value)
    return parts
