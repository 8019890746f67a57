"""Sequences of different lengths with a class each: JapaneseVowels, or arrays of one's own."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from decimal import Decimal
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fastrnn.training.data import shipped
from fastrnn.training.data.batches import MOST_SEED, ShuffledBatches
from fastrnn.training.data.module import SequenceData
from fastrnn.training.errors import InputError, check_whole, in_short, listing
from fastrnn.training.standardise import mean_and_scale

Labelled = tuple[list[Tensor], list[str]]  # sequences [T_i, I] and their class names


class LabelledData(SequenceData):
    """Arrays with class names, in parts.

    An array is whatever holds numbers: NumPy's or torch's, nested lists, a table of pandas. A label is
    text or a number, and the class is called by its text: 1, 1.0, ``tensor(1)`` and "1" are one class.
    Classes are in the order of their numbers: "2" before "10", and "take 2" before "take 10".

    Args:
        train, val, test: each (arrays [T_i, I], labels).
        batch_size: sequences a batch, over all processes.
        seed: of the order in training.

    Raises:
        InputError: a batch_size below 1, no sequences, an empty one, other features, no numbers, missing
            values or labels, one class only, or a class in val or test that is absent from train.
    """

    def __init__(
        self,
        train: tuple[Sequence[Any], Sequence[Any]],
        val: tuple[Sequence[Any], Sequence[Any]],
        test: tuple[Sequence[Any], Sequence[Any]],
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_whole("batch_size", batch_size)
        check_whole("seed", seed, 0, MOST_SEED)
        self.parts = {"train": train, "val": val, "test": test}
        self.batch_size, self.seed = batch_size, seed

    @cached_property
    def checked(self) -> dict[str, Labelled]:
        for name, part in self.parts.items():
            if not isinstance(part, (tuple, list)) or len(part) != 2:
                raise InputError(f"{name} must be (arrays, labels), got {type(part).__name__}")
        parts = {name: as_labelled(name, *part) for name, part in self.parts.items()}
        features = parts["train"][0][0].shape[1]
        known = set(parts["train"][1])
        if len(known) == 1:
            raise InputError(f"train has one class only, {listing(known)}: a classifier needs at least 2")
        for name, (sequences, labels) in parts.items():
            for i, sequence in enumerate(sequences):
                if sequence.shape[1] != features:
                    raise InputError(
                        f"{name}[{i}] must have {features} features as train[0], got {sequence.shape[1]}"
                    )
            if absent := in_order(set(labels) - known):
                raise InputError(f"classes of {name} absent from training: {listing(absent)}")
        return parts

    @cached_property
    def spec(self) -> dict[str, Any]:
        sequences, labels = self.checked["train"]
        return {
            **mean_and_scale(torch.cat(sequences)),
            "classes": in_order(set(labels)),
        }

    def batches(self, part: str, rank: int, world: int) -> ShuffledBatches:
        sequences, labels = self.checked[part]
        number = {c: i for i, c in enumerate(self.spec["classes"])}
        if unknown := in_order(set(labels) - number.keys()):
            raise InputError(f"classes of {part} that the model does not know: {listing(unknown)}")
        targets = torch.tensor([number[label] for label in labels])
        seed = self.seed if part == "train" else None
        return ShuffledBatches(sequences, targets, self.batch_size, seed, rank, world)


def as_labelled(name: str, arrays: Sequence[Any], labels: Sequence[Any]) -> Labelled:
    """Arrays [T_i, I] as float64 tensors and labels as text, checked."""
    if len(shape := getattr(labels, "shape", (0,))) != 1:
        raise InputError(f"labels of {name} must be [N], one for each array; got {list(shape)}")
    arrays, labels = listed(f"arrays of {name}", arrays), listed(f"labels of {name}", labels)
    if not len(arrays) or len(arrays) != len(labels):
        raise InputError(
            f"{name} must hold as many labels as arrays, and at least one: "
            f"got {len(arrays)} arrays, {len(labels)} labels"
        )
    sequences = [as_sequence(f"{name}[{i}]", a) for i, a in enumerate(arrays)]
    for i, sequence in enumerate(sequences):
        if sequence.dim() != 2 or not sequence.numel():
            raise InputError(f"{name}[{i}] must be [T, I], T > 0, I > 0; got {list(sequence.shape)}")
        for step, feature in (~sequence.float().isfinite()).nonzero()[:1].tolist():
            value = float(sequence[step, feature])
            what = (
                "a missing value" if math.isnan(value) else f"{value:g}, infinite or too large for float32,"
            )
            raise InputError(f"{name}[{i}] has {what} at step {step}, feature {feature}")
    return sequences, [class_name(f"{name}[{i}]", label) for i, label in enumerate(labels)]


def listed(what: str, values: Any) -> list[Any]:
    """The items of a list, an array, a tensor or a column."""
    try:
        if not isinstance(values, (str, bytes, dict, set)):
            return list(values)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor without a first dimension
        pass
    raise InputError(f"{what} must be a list or an array, got {type(values).__name__}")


def as_sequence(where: str, values: Any) -> Tensor:
    """Numbers of any kind as float64, in their shape."""
    try:
        if isinstance(values, Tensor):
            values = values.detach().cpu()
            values = (values.double() if values.is_floating_point() else values).numpy()
        if isinstance(values, np.ma.MaskedArray):
            values = np.ma.filled(values.astype(np.float64), np.nan)
        found = np.asarray(values)
        if found.dtype == object and not any(isinstance(v, (str, bytes)) for v in found.flat):
            found = found.astype(np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        first = str(error).partition("\n")[0]
        raise InputError(f"{where} must be numbers [T, I]: {first}") from None
    if found.dtype.kind not in "biuf":
        raise InputError(f"{where} must be numbers [T, I], got {found.dtype}")
    return torch.from_numpy(found.astype(np.float64))


def class_name(where: str, label: Any) -> str:
    """What a label's class is called."""
    if isinstance(label, Tensor):
        try:
            label = (label.float() if label.dtype is torch.bfloat16 else label).detach().cpu().numpy()
        except (TypeError, RuntimeError) as error:  # quantised, or without data
            raise InputError(f"the label of {where} cannot be read: {in_short(error)}") from None
    if isinstance(label, np.ndarray) and label.size == 1:
        (label,) = label.reshape(-1)
        label = None if label is np.ma.masked else label
    if isinstance(label, np.generic):  # 0.1 in float32 is 0.1, by its own digits
        label = float(str(label)) if isinstance(label, np.floating) else label.item()
    if isinstance(label, bytes):
        label = label.decode(errors="backslashreplace")
    if isinstance(label, Iterable) and not isinstance(label, str):
        raise InputError(f"the label of {where} must be one value, got {listing([label])}")
    if isinstance(label, (float, Decimal)) and label % 1 == 0:
        label = int(label)
    name = str(label)
    if pd.isna(label) or not name.strip() or (isinstance(label, float) and math.isinf(label)):
        raise InputError(f"{where} has no label: {label!r}")
    return name


def in_order(names: Iterable[str]) -> list[str]:
    """Numbers by their value, then names with the numbers inside them by their value."""

    def key(name: str) -> tuple:
        if re.fullmatch(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?", name, re.ASCII | re.IGNORECASE):
            return 0, float(name), name
        parts = re.split("([0-9]+)", name)
        return 1, [float(part) if i % 2 else part for i, part in enumerate(parts)], name

    return sorted(names, key=key)


class JapaneseVowels(LabelledData):
    """Nine speakers by their utterance of two vowels: 270 series to train on, 370 to test on.

    Args:
        batch_size: sequences a batch, over all processes.
        held_out: of the 30 training utterances of each speaker, the last so many are for
            validation.
        seed: of the order in training.

    Raises:
        InputError: a batch_size below 1, or a held_out that leaves nothing to train on or to validate with.
    """

    def __init__(self, batch_size: int = 32, held_out: int = 5, seed: int = 0) -> None:
        check_whole("held_out", held_out, 1, 29)
        texts = json.loads(shipped.read("japanese_vowels.json"))
        series, labels = parse_ts(texts["train"])
        super().__init__(
            *split_by_class(series, labels, held_out),
            test=parse_ts(texts["test"]),
            batch_size=batch_size,
            seed=seed,
        )


def split_by_class(series: list[Any], labels: list[str], last: int) -> tuple[Any, Any]:
    """Two parts: the second has the last few series of each class."""
    left = {label: labels.count(label) for label in labels}
    parts: tuple[Any, Any] = (([], []), ([], []))
    for one, label in zip(series, labels, strict=True):
        part = parts[left[label] <= last]
        part[0].append(one)
        part[1].append(label)
        left[label] -= 1
    return parts


def parse_ts(text: str) -> tuple[list[np.ndarray], list[str]]:
    """Series [T, I] and labels of a ``.ts`` file: dimensions split by ``:``, the label last."""
    lines = text[text.index("@data") :].splitlines()[1:]
    rows = [line.split(":") for line in lines if line.strip()]
    series = [np.array([d.split(",") for d in dimensions], dtype=np.float32).T for *dimensions, _ in rows]
    return series, [row[-1].strip() for row in rows]
