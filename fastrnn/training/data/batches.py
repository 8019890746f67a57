"""Batches, and the one loader they come from: sized, seeded, and resumable at any batch."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastrnn.training.errors import InputError, check_whole

IGNORE = -100  # a target that carries no loss, as in F.cross_entropy
MOST_SEED = 2**32 - 1  # Lightning's limit too


class StreamBatch(NamedTuple):
    """A chunk of B parallel streams of symbols."""

    x: Tensor  # [T, B] symbols
    y: Tensor  # [T, B] next symbols, IGNORE where there is none
    reset: Tensor  # bool [T, B] on the CPU: a new document starts here, the state before it is zero
    keep: int  # the state after this many steps is the next chunk's first
    weight: float = 1.0  # this process's share of the targets, times the number of processes

    @property
    def tokens(self) -> int:
        return self.x.numel()

    def to(self, device: torch.device) -> "StreamBatch":
        """Where Lightning trains. The host reads ``reset``, which stays: reading it there would wait for the
        device."""
        x, y = (t.to(device, non_blocking=True) for t in (self.x, self.y))
        return self._replace(x=x, y=y)


class SequenceBatch(NamedTuple):
    """B sequences of their own lengths, each with one target."""

    x: Tensor  # [T, B, I], padded with zeros
    lengths: Tensor  # [B] on the CPU
    y: Tensor  # [B] classes, or [K, B, O] values
    weight: float = 1.0  # this process's share of the sequences, times the number of processes

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def to(self, device: torch.device) -> "SequenceBatch":
        """Where Lightning trains; the lengths stay, as the host reads them."""
        x, y = (t.to(device, non_blocking=True) for t in (self.x, self.y))
        return self._replace(x=x, y=y)


class Batches(ABC):
    """An iterable of batches that knows its place: ``batch(epoch, i)`` alone decides the content.

    A checkpoint keeps (epoch, position) through ``state_dict``; after ``load_state_dict`` the next
    iteration goes on with the batch that had not been given out yet. Lightning calls both.

    Raises:
        InputError: on loading, a place among other batches.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world
        self.epoch, self.position = -1, 0
        self._resumed = False

    @abstractmethod
    def __len__(self) -> int: ...

    def decisive(self) -> dict[str, Any]:
        """The settings that, with (epoch, position), determine the content of a batch."""
        return {}

    @abstractmethod
    def batch(self, epoch: int, index: int) -> Any:
        """This process's part of batch ``index`` of an epoch."""

    def __iter__(self) -> Iterator[Any]:
        if not (self._resumed and self.position < len(self)):
            self.epoch, self.position = self.epoch + 1, 0
        self._resumed = False
        while self.position < len(self):
            self.position += 1  # counted before it is used: a checkpoint in its step includes it
            yield self.batch(self.epoch, self.position - 1)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, "decisive": self.decisive()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved, here = state.get("decisive", {}), self.decisive()
        if differing := [name for name in here if name in saved and saved[name] != here[name]]:
            each = "; ".join(f"{name} is {saved[name]} there, {here[name]} here" for name in differing)
            raise InputError(f"the checkpoint's place is among other batches: {each}")
        self.epoch, self.position = state["epoch"], state["position"]
        self._resumed = True


class ItemBatches(Batches):
    """Batches of numbered items, in a new order each epoch.

    Args:
        count: items.
        size: items a batch, over all processes.
        seed: of the order; None keeps the given order.

    Raises:
        InputError: a size below 1.
    """

    def __init__(self, count: int, size: int, seed: int | None, rank: int = 0, world: int = 1) -> None:
        super().__init__(rank, world)
        check_whole("batch_size", size)
        self.count, self.size, self.seed = count, size, seed
        self._order: tuple[int, Tensor] | None = None  # the last epoch, and its order

    def __len__(self) -> int:
        whole, rest = divmod(self.count, self.size)
        return whole + (rest >= self.world)  # a rest that cannot give each process one is left out

    def decisive(self) -> dict[str, Any]:
        return {"batch_size": self.size, "seed": self.seed, "sequences": self.count}

    @abstractmethod
    def items(self, chosen: Tensor) -> SequenceBatch:
        """A batch of the items of these numbers."""

    def order(self, epoch: int) -> Tensor:
        """The items' numbers [count]; made once an epoch, for it takes as long as there are items."""
        if self._order is None or self._order[0] != epoch:
            assert self.seed is not None
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(self.count, generator=generator)
        return self._order[1]

    def batch(self, epoch: int, index: int) -> SequenceBatch:
        part = slice(index * self.size, (index + 1) * self.size)
        chosen = torch.arange(*part.indices(self.count)) if self.seed is None else self.order(epoch)[part]
        mine = chosen[self.rank :: self.world]
        return self.items(mine)._replace(weight=len(mine) * self.world / len(chosen))


class ShuffledBatches(ItemBatches):
    """Sequences of different lengths with their targets, in a new order each epoch.

    Args:
        sequences: each [T_i, I].
        targets: [N, ...], one for each sequence.
        size: sequences a batch, over all processes.
        seed: of the order; None keeps the given order.

    Raises:
        InputError: a size below 1.
    """

    def __init__(
        self,
        sequences: list[Tensor],
        targets: Tensor,
        size: int,
        seed: int | None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__(len(sequences), size, seed, rank, world)
        self.sequences, self.targets = sequences, targets

    def items(self, chosen: Tensor) -> SequenceBatch:
        sequences = [self.sequences[i] for i in chosen.tolist()]
        y = self.targets[chosen]  # [B] or [B, K, O]
        return SequenceBatch(
            x=pad_sequence(sequences),
            lengths=torch.tensor([len(s) for s in sequences]),
            y=y.transpose(0, 1).contiguous() if y.dim() == 3 else y,
        )


class WindowBatches(ItemBatches):
    """Every window of T steps of a series and the K steps after it, cut out when its turn comes.

    Args:
        series: [N, I].
        window: known steps T.
        horizon: steps ahead K.
        size: windows a batch, over all processes.
        seed: of the order; None keeps the order of time.
    """

    def __init__(
        self,
        series: Tensor,
        window: int,
        horizon: int,
        size: int,
        seed: int | None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__(len(series) - window - horizon + 1, size, seed, rank, world)
        self.series, self.window = series, window
        self.steps = torch.arange(window + horizon)[:, None]

    def items(self, chosen: Tensor) -> SequenceBatch:
        x, y = self.series[chosen + self.steps].tensor_split([self.window])  # [T, B, I] and [K, B, I]
        return SequenceBatch(x, torch.full((len(chosen),), self.window), y)
