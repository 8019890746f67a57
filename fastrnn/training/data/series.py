"""Series of numbers in windows: past in, future out. Shipped series, or columns of a CSV file."""

from functools import cached_property
from typing import Any

import numpy as np
import torch

from fastrnn.training.data import shipped
from fastrnn.training.data.batches import MOST_SEED, WindowBatches
from fastrnn.training.data.module import SequenceData
from fastrnn.training.data.table import CsvFormat, Table, parse_csv
from fastrnn.training.data.text import read_text, several
from fastrnn.training.errors import InputError, check_held_out, check_once, check_whole
from fastrnn.training.standardise import mean_and_scale

SHIPPED = {"co2": ["co2"], "sunspots": ["sunspots"]}


class SeriesData(SequenceData):
    """Every window of a table of series; the parts follow each other in time.

    Args:
        source: ``co2`` or ``sunspots``, or the path of a CSV file with a header.
        columns: of the CSV file, or one; all are inputs and all are forecast.
        window: known steps T.
        horizon: steps ahead K.
        season: steps of a season, for the naive forecast; None for none.
        held_out: shares of the steps, from the end, for validation and for test.
        missing: ``raise`` or ``interpolate`` (linearly between known neighbours).
        batch_size: windows a batch, over all processes.
        seed: of the order in training.
        csv: how the file is written, by pandas' names for it; see ``CsvFormat``.

    Raises:
        InputError: a size below 1, shares of 1 or more together, a column named twice; and, once the
            file is read, whatever in it does not fit.
    """

    def __init__(
        self,
        source: str = "co2",
        columns: list[str] | str | None = None,
        window: int = 104,
        horizon: int = 12,
        season: int | None = None,
        held_out: tuple[float, float] = (0.1, 0.2),
        missing: str = "raise",
        batch_size: int = 64,
        seed: int = 0,
        **csv: Any,
    ) -> None:
        super().__init__()
        self.format = CsvFormat(**csv)
        if missing not in ("raise", "interpolate"):
            raise InputError(f"missing must be raise or interpolate, got {missing!r}")
        for name, size in (("window", window), ("horizon", horizon), ("batch_size", batch_size)):
            check_whole(name, size)
        if season is not None:
            check_whole("season", season)
            if season > window:
                raise InputError(
                    f"season must be at most the window, {window} steps, where the naive forecast "
                    f"finds the value of one season before, got {season}"
                )
        check_whole("seed", seed, 0, MOST_SEED)
        check_held_out(held_out)
        names: list[str] | None = several(columns)
        check_once("columns", names or ())
        self.source, self.columns = source, names or SHIPPED.get(source)
        self.window, self.horizon, self.season = window, horizon, season
        self.held_out, self.missing = held_out, missing
        self.batch_size, self.seed = batch_size, seed

    @cached_property
    def table(self) -> torch.Tensor:
        """All values, float64 [N, I]."""
        known = self.source in SHIPPED
        text = shipped.read(f"{self.source}.csv") if known else read_text(self.source, self.format.encoding)
        table = parse_csv(text, self.columns, self.format, self.source)
        return torch.tensor(fill(table, self.missing, self.source))

    @cached_property
    def parts(self) -> dict[str, torch.Tensor]:
        """Values [N_part, I]; val and test begin a window early, so that all their steps count."""
        val, test = (int(share * len(self.table)) for share in self.held_out)
        start_val, start_test = len(self.table) - val - test, len(self.table) - test
        parts = {
            "train": self.table[:start_val],
            "val": self.table[max(0, start_val - self.window) : start_test],
            "test": self.table[max(0, start_test - self.window) :],
        }
        for name, part in parts.items():
            if len(part) < self.window + self.horizon:
                raise InputError(
                    f"{name} has {len(part)} steps of {self.source}: too short for a window of "
                    f"{self.window} and {self.horizon} steps ahead; set data.window or data.horizon smaller"
                )
        return parts

    @cached_property
    def spec(self) -> dict[str, Any]:
        train = self.parts["train"]
        return {
            **mean_and_scale(train),
            "outputs": train.shape[1],
            "columns": self.columns,
            "season": self.season,
        }

    def batches(self, part: str, rank: int, world: int) -> WindowBatches:
        seed = self.seed if part == "train" else None
        return WindowBatches(self.parts[part], self.window, self.horizon, self.batch_size, seed, rank, world)


def fill(table: Table, missing: str, name: str) -> np.ndarray:
    """Values [N, I] without NaN: refused, or interpolated."""
    gaps = np.isnan(table.values)
    if not gaps.any():
        return table.values
    if missing != "interpolate":
        row, i = np.argwhere(gaps)[0]
        raise InputError(
            f"{name} has {gaps.sum()} missing values, the first in line {table.lines[row]}, column "
            f"{table.columns[i]}; set missing to interpolate, or fill them"
        )
    values = table.values.copy()
    steps = np.arange(len(values))
    for i, column in enumerate(table.columns):
        known = ~gaps[:, i]
        if not known.any():
            raise InputError(f"column {column} of {name} has no values at all")
        values[:, i] = np.interp(steps, steps[known], values[known, i])
    return values
