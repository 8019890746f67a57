"""The classic tests of memory, made up afresh for every batch from its number.

Adding: Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 9 (1997), in the
form of Le, Jaitly, Hinton, arXiv:1504.00941. Copy: Arjovsky, Shah, Bengio, "Unitary evolution
recurrent neural networks", ICML 2016. Parity: every bit matters, to the last.
"""

from collections.abc import Callable
from typing import Any

import torch

from fastrnn.training.data.batches import IGNORE, MOST_SEED, Batches, SequenceBatch, StreamBatch
from fastrnn.training.data.module import SequenceData
from fastrnn.training.errors import InputError, check_name, check_whole

COPIED = 10  # symbols to remember
ALPHABET = 8  # symbols; then blank (8) and the signal to recall (9)


class MemoryData(SequenceData):
    """Endless fresh sequences of one problem.

    Args:
        problem: ``adding`` (Forecaster), ``parity`` (SequenceClassifier) or ``copy``
            (LanguageModel).
        length: T; for parity, the longest; for copy, the blanks between the symbols and their recall.
        batch_size: sequences a batch, over all processes.
        epoch: training batches that make an epoch.
        evaluation: batches of val, and of test.
        seed: of all sequences.

    Raises:
        InputError: an unknown problem, or a size below 1.
    """

    def __init__(
        self,
        problem: str = "adding",
        length: int = 200,
        batch_size: int = 64,
        epoch: int = 200,
        evaluation: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_name("problem", problem, PROBLEMS)
        check_whole("length", length, 2)
        for name, size in (("batch_size", batch_size), ("epoch", epoch), ("evaluation", evaluation)):
            check_whole(name, size)
        check_whole("seed", seed, 0, MOST_SEED)
        self.problem, self.length, self.batch_size = problem, length, batch_size
        self.sizes = {"train": epoch, "val": evaluation, "test": evaluation}
        self.seed = seed

    @property
    def spec(self) -> dict[str, Any]:
        specs: dict[str, dict[str, Any]] = {
            "adding": {"mean": [0.0, 0.0], "scale": [1.0, 1.0], "outputs": 1},
            "parity": {"mean": [0.5], "scale": [0.5], "classes": ["even", "odd"]},
            "copy": {"symbols": ALPHABET + 2},
        }
        return specs[self.problem]

    def batches(self, part: str, rank: int, world: int) -> "MadeUpBatches":
        return MadeUpBatches(self, part, rank, world)


class MadeUpBatches(Batches):
    """Batch i of epoch e is drawn from a generator seeded with (seed, part, e, i)."""

    def __init__(self, data: MemoryData, part: str, rank: int, world: int) -> None:
        super().__init__(rank, world)
        if data.batch_size % world:
            raise InputError(f"batch_size must be divisible by the {world} processes")
        self.data, self.part = data, part

    def __len__(self) -> int:
        return self.data.sizes[self.part]

    def decisive(self) -> dict[str, Any]:
        settings = {name: getattr(self.data, name) for name in ("length", "batch_size", "seed")}
        return settings | {"epoch": len(self)}

    def batch(self, epoch: int, index: int) -> Any:
        data = self.data
        part = ("train", "val", "test").index(self.part)
        number = ((data.seed * 3 + part) * 1_000_003 + (epoch if part == 0 else 0)) * 1_000_003
        generator = torch.Generator().manual_seed((number + index) % 2**63)
        made = PROBLEMS[data.problem](data.length, data.batch_size, generator)
        mine = slice(self.rank, None, self.world)
        if isinstance(made, StreamBatch):
            x, y, reset = (v[:, mine] for v in (made.x, made.y, made.reset))
            return made._replace(x=x, y=y, reset=reset)
        y = made.y[:, mine] if made.y.dim() == 3 else made.y[mine]
        return made._replace(x=made.x[:, mine], lengths=made.lengths[mine], y=y)


def adding(length: int, batch: int, generator: torch.Generator) -> SequenceBatch:
    """Numbers in [0, 1) and two marks, one in each half; the target is the marked numbers' sum."""
    numbers = torch.rand(length, batch, generator=generator)
    marks = torch.zeros(length, batch)
    half = length // 2
    rows = torch.arange(batch)
    marks[torch.randint(half, (batch,), generator=generator), rows] = 1.0
    marks[torch.randint(half, length, (batch,), generator=generator), rows] = 1.0
    target = (numbers * marks).sum(0).view(1, batch, 1)
    lengths = torch.full((batch,), length)
    return SequenceBatch(torch.stack([numbers, marks], -1), lengths, target)


def parity(length: int, batch: int, generator: torch.Generator) -> SequenceBatch:
    """One to ``length`` bits; the class is whether their sum is odd.

    The short ones are what makes it learnable: at a fixed length nothing less than all of the
    solution lowers the loss.
    """
    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    bits = torch.randint(2, (int(lengths.max()), batch), generator=generator)
    bits[torch.arange(len(bits))[:, None] >= lengths] = 0
    return SequenceBatch(bits[..., None].float(), lengths, bits.sum(0) % 2)


def copy(length: int, batch: int, generator: torch.Generator) -> StreamBatch:
    """Ten symbols, ``length`` blanks, a signal; then the symbols are to be recalled."""
    symbols = torch.randint(ALPHABET, (COPIED, batch), generator=generator)
    total = 2 * COPIED + length
    x = torch.full((total, batch), ALPHABET)
    x[:COPIED] = symbols
    x[COPIED + length] = ALPHABET + 1
    y = torch.full((total, batch), IGNORE)
    y[-COPIED:] = symbols
    reset = torch.zeros(total, batch, dtype=torch.bool)
    reset[0] = True
    return StreamBatch(x, y, reset, keep=total)


PROBLEMS: dict[str, Callable[..., StreamBatch | SequenceBatch]] = {
    "adding": adding,
    "parity": parity,
    "copy": copy,
}
