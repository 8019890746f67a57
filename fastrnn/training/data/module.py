"""The data module that all data sets share: parts in, resumable loaders out."""

from abc import abstractmethod
from functools import cached_property
from typing import Any

import lightning as L

from fastrnn.training.data.batches import Batches
from fastrnn.training.errors import InputError, listing


class SequenceData(L.LightningDataModule):
    """Data with a ``spec`` that a task is built from, and batches for each part and process."""

    @cached_property
    def spec(self) -> dict[str, Any]:
        """Plain values: what the model must know of the data."""
        raise NotImplementedError

    def adopt(self, spec: dict[str, Any]) -> None:
        """Take a trained model's spec, so that symbols and classes are numbered as it knows them.

        Raises:
            InputError: the data's columns are not the model's.
        """
        columns, wanted = self.spec.get("columns"), spec.get("columns")
        if columns != wanted:
            named = (listing(names) if names else "none" for names in (wanted, columns))
            raise InputError("columns must be the model's: {}; got {}".format(*named))
        self.__dict__["spec"] = spec

    @abstractmethod
    def batches(self, part: str, rank: int, world: int) -> Batches:
        """The loader of ``train``, ``val`` or ``test`` for one of ``world`` processes."""

    def _loader(self, part: str) -> Batches:
        trainer = self.trainer
        return self.batches(part, trainer.global_rank if trainer else 0, trainer.world_size if trainer else 1)

    def train_dataloader(self) -> Batches:
        return self._loader("train")

    def val_dataloader(self) -> Batches:
        return self._loader("val")

    def test_dataloader(self) -> Batches:
        return self._loader("test")

    def predict_dataloader(self) -> Any:
        return self._loader("test")
