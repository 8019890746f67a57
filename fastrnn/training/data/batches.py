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
    reset: Tensor  # bool [T, B]: a new document starts here, the state before it is zero
    keep: int  # the state after this many steps is the next chunk's first
    weight: float = 1.0  # this process's share of the targets, times the number of processes

    @property
    def tokens(self) -> int:
        return self.x.numel()


class SequenceBatch(NamedTuple):
    """B sequences of their own lengths, each with one target."""

    x: Tensor  # [T, B, I], padded with zeros
    lengths: Tensor  # [B] on the CPU
    y: Tensor  # [B] classes, or [K, B, O] values
    weight: float = 1.0  # this process's share of the sequences, times the number of processes

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())


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
        """What decides, with (epoch, position), what a batch holds, by the names of the data's settings."""
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


class ShuffledBatches(Batches):
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
        super().__init__(rank, world)
        check_whole("batch_size", size)
        self.sequences, self.targets, self.size, self.seed = sequences, targets, size, seed

    def __len__(self) -> int:
        whole, rest = divmod(len(self.sequences), self.size)
        return whole + (rest >= self.world)  # a rest that cannot give each process one is left out

    def decisive(self) -> dict[str, Any]:
        return {"batch_size": self.size, "seed": self.seed, "sequences": len(self.sequences)}

    def batch(self, epoch: int, index: int) -> SequenceBatch:
        order = torch.arange(len(self.sequences))
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            order = torch.randperm(len(order), generator=generator)
        chosen = order[index * self.size : (index + 1) * self.size]
        mine = chosen[self.rank :: self.world]
        sequences = [self.sequences[i] for i in mine.tolist()]
        y = self.targets[mine]  # [B] or [B, K, O]
        return SequenceBatch(
            x=pad_sequence(sequences),
            lengths=torch.tensor([len(s) for s in sequences]),
            y=y.transpose(0, 1).contiguous() if y.dim() == 3 else y,
            weight=len(mine) * self.world / len(chosen),
        )
