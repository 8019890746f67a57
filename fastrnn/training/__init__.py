"""Training sequence models: tasks, data, truncated BPTT, gradient flow, reports, command line.

Every piece stands alone: the tasks are LightningModules, the data modules are LightningDataModules,
``StateCarrier``, ``StreamChunks``, ``clip`` and ``StateGradientNorms`` fit any loop of one's own.
"""

try:
    import jsonargparse  # noqa: F401
    import lightning  # noqa: F401
    import matplotlib  # noqa: F401
    import rich  # noqa: F401
    import torchmetrics  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}: training needs pip install 'fastrnn[train]'") from None

from fastrnn.training.classification import SequenceClassifier
from fastrnn.training.clipping import GradientClipping, clip
from fastrnn.training.data.batches import SequenceBatch, StreamBatch
from fastrnn.training.data.labelled import JapaneseVowels, LabelledData
from fastrnn.training.data.memory import MemoryData
from fastrnn.training.data.series import SeriesData
from fastrnn.training.data.text import TextData, Vocabulary
from fastrnn.training.errors import InputError
from fastrnn.training.forecasting import Forecaster
from fastrnn.training.gradient_flow import GradientFlow
from fastrnn.training.language import LanguageModel, Sampling
from fastrnn.training.optim import Optim
from fastrnn.training.report import Report
from fastrnn.training.speed import Throughput, compare_backends
from fastrnn.training.stack import Stack
from fastrnn.training.states import StateGradientNorms
from fastrnn.training.tbptt import StateCarrier, StreamChunks, scan

__all__ = [
    "Forecaster",
    "GradientClipping",
    "GradientFlow",
    "InputError",
    "JapaneseVowels",
    "LabelledData",
    "LanguageModel",
    "MemoryData",
    "Optim",
    "Report",
    "Sampling",
    "SequenceBatch",
    "SequenceClassifier",
    "SeriesData",
    "Stack",
    "StateCarrier",
    "StateGradientNorms",
    "StreamBatch",
    "StreamChunks",
    "TextData",
    "Throughput",
    "Vocabulary",
    "clip",
    "compare_backends",
    "scan",
]
