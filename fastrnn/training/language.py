"""Language modelling: the next symbol at every step, with the state carried from chunk to chunk."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from fastrnn.training.data.batches import IGNORE, StreamBatch
from fastrnn.training.data.text import Vocabulary
from fastrnn.training.errors import InputError, check_number, check_whole
from fastrnn.training.optim import Optim
from fastrnn.training.stack import Stack
from fastrnn.training.tasks import SequenceTask
from fastrnn.training.tbptt import State, StateCarrier, map_state, scan


@dataclass
class Sampling:
    """How characters are drawn: see ``LanguageModel.generate``.

    Raises:
        InputError: a length, temperature or seed below zero, or a top_k below one.
    """

    length: int = 600
    temperature: float = 0.8
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("length", self.length, 0)
        check_number("temperature", self.temperature, "[0, inf)")
        if self.top_k is not None:
            check_whole("top_k", self.top_k)
        check_whole("seed", self.seed, 0, 2**64 - 1)


class LanguageModel(SequenceTask):
    """Embedding, recurrent stack, linear layer; cross-entropy at every step.

    Metrics are bits per symbol (``bpc``) and perplexity, both from the mean cross-entropy.

    Args:
        spec: ``{"vocabulary": "abc..."}``, or ``{"symbols": V}`` for symbols without characters.
        embedding_size: features I of a symbol.
        dropout: on the embedding and on the stack's output, in training.
        sampling: how text is drawn for the report and by ``predict``.

    Raises:
        InputError: data without symbols, a bidirectional stack, or a number out of its range.
    """

    fixed = ("embedding_size",)
    nats: Any  # torchmetrics by stage

    def __init__(
        self,
        spec: dict[str, Any],
        stack: Stack | None = None,
        optim: Optim | None = None,
        embedding_size: int = 64,
        dropout: float = 0.0,
        sampling: Sampling | None = None,
    ) -> None:
        super().__init__(spec, stack, optim)
        self.sampling = Sampling(**sampling) if isinstance(sampling, dict) else sampling or Sampling()
        self.save_hyperparameters()
        if not {"vocabulary", "symbols"} & spec.keys():
            raise InputError(
                f"LanguageModel needs data with a vocabulary or symbols, not a spec of {', '.join(spec)}"
            )
        check_whole("embedding_size", embedding_size)
        check_number("dropout", dropout, "[0, 1]")
        if self.stack.sees_the_future:
            raise InputError("a language model cannot be bidirectional or reversed: it would see the future")
        self.vocabulary = Vocabulary(spec["vocabulary"]) if "vocabulary" in spec else None
        symbols = len(self.vocabulary) if self.vocabulary else int(spec["symbols"])
        self.embed = nn.Embedding(symbols, embedding_size)
        self.rnn = self.stack.build(embedding_size)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.stack.output_size, symbols)
        self.carriers = {"train": StateCarrier(), "val": StateCarrier(), "test": StateCarrier()}
        self.nats = nn.ModuleDict({stage: MeanMetric() for stage in ("val", "test")})

    def forward(self, x: Tensor, state: State = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """Logits [T, B, V] of the next symbols, and the state after x [T, B]."""
        reset = torch.zeros(x.shape, dtype=torch.bool) if reset is None else reset
        y, state = scan(self.rnn, self.dropout(self.embed(x)), state, reset)
        return self.head(self.dropout(y)), state

    def _chunk_logits(self, batch: StreamBatch, carrier: StateCarrier) -> Tensor:
        x = self.dropout(self.embed(batch.x))
        return self.head(self.dropout(carrier(self.rnn, x, batch.reset, batch.keep)))

    def training_step(self, batch: StreamBatch, batch_idx: int) -> Tensor:
        logits = self._chunk_logits(batch, self.carriers["train"])
        self.end_loss = lambda: mean_nats(logits[-1], batch.y[-1])
        loss = mean_nats(logits, batch.y)
        if self.logs:
            self.log("train/loss", loss.detach())
            self.show("train/bpc", loss.detach() / math.log(2))
        return loss * batch.weight

    def _evaluate(self, batch: StreamBatch, stage: str) -> None:
        nats = mean_nats(self._chunk_logits(batch, self.carriers[stage]), batch.y)
        self.nats[stage].update(nats, int((batch.y != IGNORE).sum()))

    def _finish(self, stage: str) -> None:
        nats = self.nats[stage].compute()
        self.nats[stage].reset()
        self.log(f"{stage}/loss", nats, sync_dist=True)
        self.log(f"{stage}/bpc", nats / math.log(2), prog_bar=True, sync_dist=True)
        self.log(f"{stage}/perplexity", nats.exp(), sync_dist=True)

    def validation_step(self, batch: StreamBatch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def test_step(self, batch: StreamBatch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def predict_step(self, batch: str, batch_idx: int) -> str:
        """A prompt, continued."""
        return self.generate(batch, **asdict(self.sampling))

    def loss_of(self, batch: StreamBatch) -> Tensor:
        logits, _ = self(batch.x, self.carriers["train"].state, batch.reset)
        return mean_nats(logits, batch.y)

    @torch.no_grad()
    def generate(
        self,
        prompt: str | None = None,
        length: int = 500,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int = 0,
    ) -> str:
        """The prompt and ``length`` more characters, drawn one by one.

        Args:
            prompt: at least one character, all of the vocabulary; ``Vocabulary.start`` when left out.
            temperature: divides the logits; 0 takes the likeliest character.
            top_k: only the k likeliest characters can be drawn.

        Raises:
            InputError: the prompt is empty or holds unknown characters, a setting that ``Sampling``
                refuses, or the model's weights have diverged.
        """
        if self.vocabulary is None:
            raise InputError("this model's symbols are not characters: there is no text to generate")
        how = Sampling(length, temperature, top_k, seed)
        prompt = self.vocabulary.start if prompt is None else prompt
        if isinstance(prompt, str) and not prompt:
            raise InputError("prompt must hold at least one character")
        x, state, drawn = self.vocabulary.encode(prompt).to(self.device)[:, None], None, []
        generator = torch.Generator(self.device).manual_seed(how.seed)
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            for _ in range(how.length):
                logits, state = self(x, state)
                x = draw(logits[-1], how.temperature, how.top_k, generator)[None]
                drawn.append(int(x))
        finally:
            for module in training:
                module.training = True
        return prompt + self.vocabulary.decode(drawn)

    def exhibits(self) -> Iterator[tuple[str, Figure | str]]:
        if self.vocabulary:
            yield "Sample", self.generate(**asdict(self.sampling))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["carried_state"] = self.carriers["train"].gathered()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._saved_state = checkpoint.get("carried_state")

    def on_train_start(self) -> None:
        super().on_train_start()
        saved, self._saved_state = getattr(self, "_saved_state", None), None
        rank, world = self.global_rank, self.trainer.world_size
        here = map_state(lambda s: s.to(self.head.weight), saved)  # of another precision, perhaps
        self.carriers["train"].scatter(here, rank, world)


def mean_nats(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of logits [..., V] over the targets y [...]; zero where there are none."""
    total = F.cross_entropy(logits.flatten(0, -2), y.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / (y != IGNORE).sum().clamp_min(1)


def draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    """One symbol [B] for each row of logits [B, V]."""
    if not logits.isfinite().all():
        raise InputError("the model's outputs are not finite: its training has diverged")
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits - logits.amax(-1, keepdim=True)).double() / temperature  # 1e-300 overflows float32
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
