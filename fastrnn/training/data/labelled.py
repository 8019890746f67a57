"""Sequences of different lengths with a class each: JapaneseVowels, or arrays of one's own."""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrnn.training.data import shipped
from fastrnn.training.data.batches import ShuffledBatches
from fastrnn.training.data.module import SequenceData
from fastrnn.training.errors import InputError

Labelled = tuple[list[Tensor], list[str]]  # sequences [T_i, I] and their class names


class LabelledData(SequenceData):
    """Arrays with class names, in parts.

    Args:
        train, val, test: each (arrays [T_i, I], labels).
        batch_size: sequences a batch, over all processes.
        seed: of the order in training.

    Raises:
        InputError: no sequences, an empty one, other features, missing values, or a class in val
            or test that is absent from train.
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
        self.parts = {"train": train, "val": val, "test": test}
        self.batch_size, self.seed = batch_size, seed

    @cached_property
    def checked(self) -> dict[str, Labelled]:
        parts = {name: as_labelled(name, *part) for name, part in self.parts.items()}
        features = parts["train"][0][0].shape[1]
        known = set(parts["train"][1])
        for name, (sequences, labels) in parts.items():
            for i, sequence in enumerate(sequences):
                if sequence.shape[1] != features:
                    raise InputError(
                        f"{name}[{i}] must have {features} features as train[0], got {sequence.shape[1]}"
                    )
            if absent := sorted(set(labels) - known):
                raise InputError(f"classes of {name} absent from training: {', '.join(absent)}")
        return parts

    @cached_property
    def spec(self) -> dict[str, Any]:
        sequences, labels = self.checked["train"]
        steps = torch.cat(sequences)
        return {
            "mean": steps.mean(0).tolist(),
            "scale": steps.std(0).clamp_min(1e-8).tolist(),
            "classes": sorted(set(labels)),
        }

    def batches(self, part: str, rank: int, world: int) -> ShuffledBatches:
        sequences, labels = self.checked[part]
        number = {c: i for i, c in enumerate(self.spec["classes"])}
        if unknown := sorted(set(labels) - number.keys()):
            raise InputError(f"classes of {part} that the model does not know: {unknown}")
        targets = torch.tensor([number[label] for label in labels])
        seed = self.seed if part == "train" else None
        return ShuffledBatches(sequences, targets, self.batch_size, seed, rank, world)


def as_labelled(name: str, arrays: Sequence[Any], labels: Sequence[Any]) -> Labelled:
    """Arrays [T_i, I] as float32 tensors and labels as text, checked."""
    if not len(arrays) or len(arrays) != len(labels):
        raise InputError(
            f"{name} must hold as many labels as arrays, and at least one: "
            f"got {len(arrays)} arrays, {len(labels)} labels"
        )
    sequences = [torch.as_tensor(np.asarray(a), dtype=torch.float32) for a in arrays]
    for i, sequence in enumerate(sequences):
        if sequence.dim() != 2 or not len(sequence):
            raise InputError(f"{name}[{i}] must be [T, I], T > 0; got {list(sequence.shape)}")
        if not sequence.isfinite().all():
            step, feature = (~sequence.isfinite()).nonzero()[0].tolist()
            raise InputError(f"{name}[{i}] has a missing value at step {step}, feature {feature}")
    return sequences, [str(label) for label in labels]


class JapaneseVowels(LabelledData):
    """Nine speakers by their utterance of two vowels: 270 series to train on, 370 to test on.

    Args:
        batch_size: sequences a batch, over all processes.
        held_out: of the 30 training utterances of each speaker, the last so many are for
            validation.
        seed: of the order in training.
    """

    def __init__(self, batch_size: int = 32, held_out: int = 5, seed: int = 0) -> None:
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
