"""The benchmark's cases as plain data: which network, on which shape, in which class of the table.

One alphabet: T time, B batch, I input size, H hidden size, P projection, G gates, D directions.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1, "MinGRU": 2}
TRAIN, INFER = "train", "infer"


@dataclass(frozen=True)
class Case:
    """One network on one shape; ``fill`` < 1 makes a PackedSequence with that share of the rows. With
    ``options``, keywords of fastrnn's module and of its call, the rival is ``plain`` on fastrnn's module."""

    cell: str
    T: int
    B: int
    I: int
    H: int
    group: str = "dense"
    layers: int = 1
    bidirectional: bool = False
    proj_size: int = 0
    dropout: float = 0.0
    fill: float = 1.0
    dtype: torch.dtype = torch.float32
    modes: tuple[str, ...] = (TRAIN, INFER)
    options: tuple[tuple[str, Any], ...] = ()  # "reset": the share of the steps with one

    @property
    def plain(self) -> "Case":
        return replace(self, options=())

    @property
    def is_loop(self) -> bool:
        """Whether this is a ``*Cell`` module, called once per step from Python."""
        return self.cell.endswith("Cell")

    @property
    def name(self) -> str:
        """``lstm-50x64x512`` is T x B x H; I stands before H where it differs."""
        width = f"{self.H}" if self.I == self.H else f"{self.I}x{self.H}"
        options = {
            f"l{self.layers}": self.layers > 1,
            "bi": self.bidirectional,
            f"proj{self.proj_size}": self.proj_size > 0,
            f"drop{self.dropout}": self.dropout > 0,
            f"packed{self.fill}": self.fill < 1,
            "fp64": self.dtype == torch.float64,
            "bf16": self.dtype == torch.bfloat16,
            "short": self.group == "short",
            **{f"{name}{value}": True for name, value in self.options},
        }
        shape = f"{self.cell.lower()}-{self.T}x{self.B}x{width}"
        return "-".join([shape, *(word for word, present in options.items() if present)])

    def class_of(self, mode: str) -> str:
        """The row of the table of classes in which this case counts."""
        activity = {TRAIN: "training", INFER: "inference"}[mode]
        return {
            "dense": f"{self.cell} {activity}",
            "packed": f"{self.cell} packed {activity}",
            "proj": f"{self.cell} proj_size {activity}",
            "stack": f"stacks {activity}",
            "step": f"{self.cell} one step",
            "short": f"short calls {activity}",
            "fp64": f"fp64 {activity}",
            "bf16": f"{self.cell} bf16 {activity}",
            "loop": f"{self.cell} loop {activity}",
            "linear": f"linear scan {activity}",
            "options": f"options beside plain {activity}",
            "costly": f"layer norm, recompute beside plain {activity}",
        }[self.group]

    def lengths(self) -> torch.Tensor:
        """[B] lengths, descending from T, evenly spread, whose mean is ``fill`` * T."""
        shortest = max(1, round(self.T * (2 * self.fill - 1)))
        return torch.linspace(self.T, shortest, self.B).round().long()

    def flops(self, mode: str) -> float:
        """Operations of the matrix products of one call; a training step has three for each."""
        rows = int(self.lengths().sum())
        D = 2 if self.bidirectional else 1
        R = self.proj_size or self.H  # the width of h
        recurrent = 0 if self.group == "linear" else R  # of the product with h
        gates = GATES[self.cell.removesuffix("Cell")] * self.H
        inputs = [self.I] + [D * R] * (self.layers - 1)
        per_row = sum(D * (gates * (width + recurrent) + self.proj_size * self.H) for width in inputs)
        return 2.0 * rows * per_row * (3 if mode == TRAIN else 1)


def _dense(cell: str, *shapes: tuple[int, ...]) -> list[Case]:
    """Cases from (T, B, H) or (T, B, I, H)."""
    return [Case(cell, T, B, width[0], width[-1]) for T, B, *width in shapes]


def _short(B: int, H: int) -> list[Case]:
    """Calls of microseconds, most of them outside the kernels: one step of a module, sixteen of a cell."""
    stacks = [Case(cell, 1, B, H, H, "short", layers) for cell in ("LSTM", "GRU") for layers in (1, 2)]
    return [*stacks, *(Case(cell, 16, B, H, H, "short") for cell in ("LSTMCell", "GRUCell"))]


# What acts between the steps of a layer, each alone.
RESETS = ("reset", 0.02), ("reset_to", True)
OPTIONS: dict[str, tuple[tuple[tuple[str, Any], ...], ...]] = {
    "GRU": (
        (("zoneout", 0.1),), (("recurrent_dropout", 0.1),), (("variational_dropout", 0.1),),
        (("state_gradient_clip", 10.0),), RESETS[:1], RESETS,
    ),
}  # fmt: skip
OPTIONS["LSTM"] = (*OPTIONS["GRU"], (("cell_clip", 50.0),))
# (T, B, H) in bfloat16. From H = 1024 on the gradients of torch 2.13's LSTM are wrong on processors with AMX.
BF16 = (100, 16, 256), (50, 16, 512), (50, 64, 512), (35, 20, 650), (50, 32, 768), (50, 1, 512)
# A normalised LSTM is chaotic: after 200 steps float32 is 3e-3 off, in torch operations too.
COSTLY = (50, ("layer_norm", True)), (200, ("memory", "recompute"))


def _step(cell: str, B: int, H: int) -> Case:
    return Case(cell, 1, B, H, H, group="step" if B == 1 else "dense", modes=(INFER,))


CASES = (
    # Square shapes, from small enough for L1 to larger than L3's share.
    *_dense("LSTM", (100, 32, 128), (100, 64, 256), (50, 64, 512), (50, 32, 1024), (200, 16, 64)),
    *_dense("LSTM", (100, 1, 256), (50, 1, 1024), (25, 4, 512)),
    # DeepBench, then RNN-T, one layer of PTB medium, AWD-LSTM.
    *_dense("LSTM", (25, 16, 512), (25, 64, 512), (50, 8, 1536), (25, 32, 2048), (150, 1, 256)),
    *_dense("LSTM", (256, 8, 240, 1024), (35, 20, 650), (70, 80, 400, 1150)),
    *_dense("GRU", (100, 32, 128), (100, 64, 256), (50, 64, 512), (50, 32, 1024), (200, 16, 64)),
    *_dense("GRU", (100, 1, 256), (50, 1, 1024), (25, 4, 512), (187, 1, 1536), (187, 32, 1536)),
    *_dense("RNN", (50, 1, 1760), (50, 64, 1760), (672, 1, 32), (100, 32, 128)),
    Case("LSTM", 200, 32, 128, 128, group="packed", fill=0.56),
    Case("LSTM", 100, 16, 256, 256, group="packed", fill=0.56),
    Case("GRU", 200, 32, 128, 128, group="packed", fill=0.56),
    Case("GRU", 100, 16, 256, 256, group="packed", fill=0.56),
    Case("LSTM", 200, 32, 128, 128, group="proj", proj_size=64),
    Case("LSTM", 100, 16, 512, 512, group="proj", proj_size=256),
    # The GNMT encoder, PTB medium, char-rnn, DeepAR, a GRU with both directions at a small batch.
    Case("LSTM", 50, 1, 256, 256, group="stack", bidirectional=True),
    Case("LSTM", 50, 64, 256, 256, group="stack", bidirectional=True),
    Case("LSTM", 35, 20, 650, 650, group="stack", layers=2),
    Case("LSTM", 50, 50, 65, 128, group="stack", layers=2),
    Case("LSTM", 100, 32, 30, 40, group="stack", layers=2, dropout=0.1),
    Case("LSTM", 100, 32, 128, 128, group="stack", layers=3, bidirectional=True, dropout=0.2),
    Case("GRU", 50, 1, 256, 256, group="stack", bidirectional=True),
    Case("GRU", 50, 32, 256, 256, group="stack", layers=2),
    *(_step(cell, B=1, H=H) for cell in ("LSTM", "GRU") for H in (256, 320, 1024)),
    *(_step(cell, B=64, H=H) for cell in ("LSTM", "GRU") for H in (320, 1024)),
    Case("LSTM", 100, 32, 128, 128, group="fp64", dtype=torch.float64),
    Case("LSTM", 50, 64, 512, 512, group="fp64", dtype=torch.float64),
    Case("GRU", 100, 32, 128, 128, group="fp64", dtype=torch.float64),
    *(
        Case(cell, T, B, H, H, group="bf16", dtype=torch.bfloat16)
        for cell in ("LSTM", "GRU")
        for T, B, H in BF16
    ),
    Case("LSTMCell", 100, 32, 128, 128, group="loop"),
    Case("LSTMCell", 100, 1, 256, 256, group="loop"),
    Case("GRUCell", 100, 32, 128, 128, group="loop"),
    Case("GRUCell", 100, 1, 256, 256, group="loop"),
    Case("MinGRU", 1000, 32, 128, 128, group="linear"),
    *(case for H in (4, 128, 320) for B in (1, 8) for case in _short(B, H)),
    *(
        Case(cell, 200, 32, 128, 128, group="options", options=options, modes=(TRAIN,))
        for cell in ("LSTM", "GRU")
        for options in OPTIONS[cell]
    ),
    *(
        Case("LSTM", T, 32, 128, 128, group="costly", options=(option,), modes=(TRAIN,))
        for T, option in COSTLY
    ),
)


@dataclass(frozen=True)
class Target:
    """The target of a class for torch time / fastrnn time: geometric mean, and worst shape."""

    mean: float
    worst: float


TARGETS = {
    "LSTM training": Target(1.5, 1.05),
    "LSTM inference": Target(1.6, 1.1),
    "GRU training": Target(3.5, 1.5),
    "GRU inference": Target(3.0, 1.6),
    "RNN training": Target(2.5, 1.3),
    "LSTM packed training": Target(6.0, 4.0),
    "GRU packed training": Target(2.5, 1.5),
    "LSTM proj_size training": Target(2.5, 1.8),
    "stacks training": Target(1.5, 1.1),
    "LSTM one step": Target(5.0, 1.0),
    "GRU one step": Target(2.0, 1.0),
    "fp64 training": Target(1.5, 1.0),
    "linear scan training": Target(5.0, 5.0),
    "short calls training": Target(1.3, 1.0),
    "short calls inference": Target(2.0, 1.0),
    "options beside plain training": Target(1 / 1.15, 1 / 1.15),
    "layer norm, recompute beside plain training": Target(1 / 1.35, 1 / 1.4),
}


def smallest_of_each_class(cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """The smoke test's choice: per group and cell, the case with the fewest operations."""
    best: dict[tuple[str, str], Case] = {}
    for case in sorted(cases, key=lambda case: case.flops(INFER)):
        best.setdefault((case.group, case.cell), case)
    return tuple(case for case in cases if case in best.values())
