"""Small data and trainers that the training tests share."""

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from fastrnn.training import LanguageModel, Optim, Stack, TextData
from fastrnn.training.run import AtomicCheckpoints, Resume, RunLog

TEXT = "".join(f"line {i} of a small text, {i * i} words long.\n" for i in range(120))


@pytest.fixture(autouse=True)
def _quiet() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # small steps: more threads only wait for each other
    warnings.filterwarnings("ignore", module="lightning")


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "small.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture
def text(text_file: str) -> TextData:
    return TextData([text_file], rows=4, k1=16)


def language_model(data: TextData, backend: str = "fastrnn", **changes: Any) -> LanguageModel:
    torch.manual_seed(0)
    stack = Stack(hidden_size=16, num_layers=2, dropout=0.2, backend=backend)
    optim = Optim(name="adamw", lr=5e-3, schedule="cosine", warmup=3)
    return LanguageModel(data.spec, stack, optim, **{"embedding_size": 8, "dropout": 0.1, **changes})


def trainer(folder: Path, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    defaults = {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": RunLog(str(folder)),
        "callbacks": [Resume(), *callbacks],
        "plugins": [AtomicCheckpoints()],
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
    }
    return L.Trainer(**{**defaults, **settings})
