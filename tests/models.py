"""Public models, whole, with the weights of their packages: what each computes on torch.nn and on fastrnn.

A model is built as its package builds it, in torch.nn's classes, and then converted. Packages whose own code
is NumPy or ONNX have a module of torch.nn here, and their own results beside it. ``python tests/models.py``
measures them; ``make models`` installs the packages into a place of their own first.
"""

import argparse
import contextlib
import importlib
import os
import pickle
import sys
import tarfile
import time
import types
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn.bench.measure import paired
from fastrnn.bench.results import cpu_model

RECURRENT = (nn.RNNBase, nn.RNNCellBase)


class Model(NamedTuple):
    module: nn.Module  # of torch.nn
    run: Callable[[nn.Module], Any]  # the tensors of one inference
    own: Callable[[], Any] | None = None  # the same from the package's own code


MODELS: dict[str, Callable[[], Model]] = {}


def model(name: str):
    def register(make: Callable[[], Model]):
        MODELS[name] = make
        return make

    return register


def folder(package: str) -> Path:
    """Of an installed package, without running its __init__."""
    spec = find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}")
    return Path(next(iter(spec.submodule_search_locations or [])))


def submodule(name: str):
    """``package.module`` without the package's __init__, which imports audio and text front ends."""
    package = name.partition(".")[0]
    if package not in sys.modules:
        shell = types.ModuleType(package)
        shell.__path__, shell.__spec__ = [str(folder(package))], find_spec(package)
        sys.modules[package] = shell
    return importlib.import_module(name)


# ---- Speech ------------------------------------------------------------------------------------------


@model("Resemblyzer, 16 windows")
def resemblyzer() -> Model:
    """Speaker embedding: three layers of LSTM over 160 frames of 40 mel channels."""
    from resemblyzer import VoiceEncoder

    mels = torch.rand(16, 160, 40)  # [B, T, I]
    return Model(VoiceEncoder("cpu", verbose=False), lambda m: m(mels))


class Silero(nn.Module):
    """silero-vad 6, after its tinygrad_model.py: speech or not, for each 512 samples with 64 before them."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        for i, (inputs, outputs, stride) in enumerate(
            ((129, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1)), 1
        ):
            setattr(self, f"conv{i}", nn.Conv1d(inputs, outputs, 3, stride, padding=1))
        self.lstm_cell = recurrent
        self.final_conv = nn.Conv1d(128, 1, 1)

    def features(self, frames: Tensor) -> Tensor:  # [T, 576] -> [T, 128]
        x = self.stft_conv(nn.functional.pad(frames, (0, 64), "reflect").unsqueeze(1))
        x = (x[:, :129] ** 2 + x[:, 129:] ** 2).sqrt()
        for i in range(1, 5):
            x = getattr(self, f"conv{i}")(x).relu()
        return x.squeeze(-1)

    def speech(self, h: Tensor) -> Tensor:  # [T, 128] -> [T]
        return self.final_conv(h.relu().unsqueeze(-1)).sigmoid().flatten()

    def forward(self, frames: Tensor) -> Tensor:
        if isinstance(self.lstm_cell, nn.LSTM):
            return self.speech(self.lstm_cell(self.features(frames))[0])
        state, found = None, []
        for frame in frames.split(1):  # as a stream arrives
            state = self.lstm_cell(self.features(frame), state)
            found.append(self.speech(state[0]))
        return torch.cat(found)


def silero(recurrent: nn.Module) -> Model:
    module = Silero(recurrent)
    scripted = torch.jit.load(folder("silero_vad") / "data/silero_vad.jit").state_dict()
    weights = [w for name, w in scripted.items() if "8k" not in name]  # in the order of the module's
    module.load_state_dict(dict(zip(module.state_dict(), weights, strict=True)))
    t = torch.arange(100 * 512) / 16000  # seconds
    wave = torch.sin(2 * torch.pi * 220 * t) * torch.sin(5 * t) * 0.3 + 0.01 * torch.randn(len(t))
    frames = nn.functional.pad(wave, (64, 0)).unfold(0, 576, 512)

    def own() -> Tensor:  # the ONNX model that the package ships
        from silero_vad import load_silero_vad

        threads, onnx = torch.get_num_threads(), load_silero_vad(onnx=True)  # which sets one thread
        torch.set_num_threads(threads)
        return torch.cat([onnx(chunk, 16000).flatten() for chunk in wave.view(-1, 1, 512)])

    return Model(module, lambda m: m(frames), own)


@model("silero-vad, frame by frame")
def silero_steps() -> Model:
    return silero(nn.LSTMCell(128, 128))


@model("silero-vad, 100 frames at once")
def silero_whole() -> Model:
    return silero(nn.LSTM(128, 128))


class Kokoro(nn.Module):
    """The text side of kokoro (Kokoro-82M's sizes): six bidirectional LSTMs over packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        parts = submodule("kokoro.modules")
        self.text_encoder = parts.TextEncoder(512, 5, 3, n_symbols=178)
        self.predictor = parts.ProsodyPredictor(style_dim=128, d_hid=512, nlayers=3)

    def forward(self, text: Tensor, lengths: Tensor, style: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        masks = torch.arange(text.shape[1]) >= lengths.unsqueeze(1)
        alignment = torch.eye(text.shape[1]).expand(len(text), -1, -1)
        duration, en = self.predictor(d, style, lengths, alignment, masks)
        return self.text_encoder(text, lengths, masks), duration, *self.predictor.F0Ntrain(en, style)


@model("kokoro's text side, 2 texts")
def kokoro() -> Model:
    lengths = torch.tensor([120, 90])
    arguments = torch.randint(0, 178, (2, 120)), lengths, torch.randn(2, 128), torch.randn(2, 512, 120)
    return Model(Kokoro(), lambda m: m(*arguments))


# ---- Text --------------------------------------------------------------------------------------------


class G2pEn(nn.Module):
    """g2p-en: a GRU reads the letters of a word, a GRUCell spells its phonemes."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.enc_emb = nn.Embedding.from_pretrained(torch.tensor(weights["enc_emb"]))
        self.dec_emb = nn.Embedding.from_pretrained(torch.tensor(weights["dec_emb"]))
        self.encoder, self.decoder = nn.GRU(256, 256, batch_first=True), nn.GRUCell(256, 256)
        self.fc = nn.Linear(256, 74)
        for part, prefix, suffix in ((self.encoder, "enc_", "_l0"), (self.decoder, "dec_", "")):
            for name in ("w_ih", "w_hh", "b_ih", "b_hh"):
                long = name.replace("w_", "weight_").replace("b_", "bias_") + suffix
                part.get_parameter(long).data = torch.tensor(weights[prefix + name])
        self.fc.weight.data, self.fc.bias.data = torch.tensor(weights["fc_w"]), torch.tensor(weights["fc_b"])

    def forward(self, words: list[Tensor]) -> list[Tensor]:
        found = []
        for letters in words:
            h = self.encoder(self.enc_emb(letters.unsqueeze(0)))[1][0]  # [1, 256]
            symbol, logits = torch.tensor([2]), []
            for _ in range(20):
                h = self.decoder(self.dec_emb(symbol), h)
                logits.append(self.fc(h))
                symbol = logits[-1].argmax(-1)
                if symbol == 3:
                    break
            found.append(torch.cat(logits))
        return found


@model("g2p-en, 4 words")
def g2p_en() -> Model:
    words = ["activationist", "recurrent", "sequential", "unrolling"]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # nltk tries to download
        from g2p_en import G2p

        theirs = G2p.__new__(G2p)
        with contextlib.suppress(LookupError):  # a dictionary of nltk's, for words that need no network
            theirs.__init__()
    theirs.load_variables()
    letters = [torch.tensor([theirs.g2idx[c] for c in [*word, "</s>"]]) for word in words]

    def own() -> list[list[str]]:
        return [theirs.predict(word) for word in words]

    def spelt(logits: list[Tensor]) -> list[list[str]]:
        return [[theirs.idx2p[i] for i in word.argmax(-1).tolist() if i != 3] for word in logits]

    module = G2pEn(theirs.variables)
    module.same = lambda logits, phonemes: spelt(logits) == phonemes
    return Model(module, lambda m: m(letters), own)


class G2pM(nn.Module):
    """g2pM: a bidirectional LSTM over packed sentences says how characters are read."""

    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        symbols, embedded = weights["embedding.weight"].shape
        H, hidden = weights["lstm.weight_hh_l0"].shape[1], len(weights["logit_layer.0.weight"])
        classes = len(weights["logit_layer.2.weight"])
        self.embedding = nn.Embedding(symbols, embedded)
        self.lstm = nn.LSTM(embedded, H, batch_first=True, bidirectional=True)
        self.logit_layer = nn.Sequential(nn.Linear(2 * H, hidden), nn.ReLU(), nn.Linear(hidden, classes))
        self.load_state_dict({name: torch.tensor(w) for name, w in weights.items()})

    def forward(self, ids: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(ids), lengths, batch_first=True, enforce_sorted=False)
        y = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0]
        return self.logit_layer(y[torch.arange(len(ids)), targets])


@model("g2pM, 32 packed sentences")
def g2pm() -> Model:
    from g2pM import G2pM as Theirs

    theirs, lengths = Theirs(), torch.randint(8, 60, (32,))
    with open(folder("g2pM") / "np_ckpt.pkl", "rb") as file:
        module = G2pM(pickle.load(file))
    ids = torch.randint(1, len(theirs.char2idx), (32, int(lengths.max())))
    ids[torch.arange(ids.shape[1]) >= lengths.unsqueeze(1)] = 0
    targets = (torch.rand(32) * lengths).long()
    module.same = lambda logits, classes: (logits.argmax(-1).numpy() == classes).all()
    return Model(
        module,
        lambda m: m(ids, lengths, targets),
        lambda: theirs.predict(ids.numpy().astype(np.int32), targets.numpy()),
    )


# ---- Others ------------------------------------------------------------------------------------------


@model("medaka, 8 x 1,000")
def medaka() -> Model:
    """Consensus of DNA: two layers of bidirectional GRU over the counts of 1,000 positions."""
    from medaka.architectures import GRUModel

    archive = folder("medaka") / "data/r1041_e82_400bps_hac_v6.0.0_model_pt.tar.gz"
    with tarfile.open(archive) as files:
        weights = torch.load(files.extractfile("model/weights.pt"), "cpu", weights_only=True)
    gates, features = weights["gru.weight_ih_l0"].shape
    module = GRUModel(num_features=features, gru_size=gates // 3)
    module.load_state_dict(weights)
    counts = torch.rand(8, 1000, features)
    return Model(module, lambda m: m(counts / counts.sum(-1, keepdim=True)))


@model("BeatNet, 30 s of frames")
def beatnet() -> Model:
    """Beats and downbeats: convolution and two layers of LSTM, 50 frames a second."""
    module = submodule("BeatNet.model").BDA(272, 150, 2, "cpu")
    module.load_state_dict(
        torch.load(folder("BeatNet") / "models/model_1_weights.pt", "cpu", weights_only=True)
    )
    frames = torch.rand(1, 1500, 272)

    def run(m: nn.Module) -> Tensor:
        m.hidden = m.cell = torch.zeros(2, 1, 150)
        return m(frames)

    return Model(module, run)


# ---- Trainings ---------------------------------------------------------------------------------------


class Training(NamedTuple):
    module: nn.Module
    step: Callable[[], object]


def ppo(convert: Callable[[nn.Module], object], with_reset: bool = False) -> Training:
    """A recurrent policy: one update of PPO on 1,024 steps of CartPole, in one sequence of many episodes."""
    from sb3_contrib import RecurrentPPO

    sizes = {"n_steps": 1024, "batch_size": 1024, "n_epochs": 1}
    algorithm = RecurrentPPO("MlpLstmPolicy", "CartPole-v1", seed=0, device="cpu", **sizes)
    convert(algorithm.policy)
    if with_reset:
        algorithm.policy._process_sequence = with_resets
    algorithm.learn(1024)
    return Training(algorithm.policy, algorithm.train)


def with_resets(features: Tensor, states: tuple, starts: Tensor, lstm: fastrnn.LSTM) -> tuple[Tensor, tuple]:
    """sb3-contrib's _process_sequence, which steps through time where an episode starts, in one call."""
    n = states[0].shape[1]
    x = features.reshape(n, -1, lstm.input_size).swapaxes(0, 1)  # [T, n, I]
    y, states = lstm(x, states, reset=starts.reshape(n, -1).swapaxes(0, 1).bool())
    return y.transpose(0, 1).flatten(0, 1), states


def hydrology(convert: Callable[[nn.Module], object]) -> Training:
    """A forecaster: neuralhydrology's CudaLSTM on a year of five inputs a day in 64 basins."""
    from neuralhydrology.modelzoo.cudalstm import CudaLSTM
    from neuralhydrology.utils.config import Config

    inputs = [f"x{i}" for i in range(5)]
    settings = {
        "model": "cudalstm", "head": "regression", "hidden_size": 64, "seq_length": 365, "predict_last_n": 1,
        "output_dropout": 0.0, "initial_forget_bias": 3, "dynamic_inputs": inputs, "target_variables": ["y"],
    }  # fmt: skip
    module = CudaLSTM(Config(settings))
    convert(module)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    data = {"x_d": {name: torch.randn(64, 365, 1) for name in inputs}}
    target = torch.stack([*data["x_d"].values()])[:, :, -30:].mean((0, 2))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(module(data)["y_hat"][:, -1], target).backward()
        optimizer.step()

    return Training(module, step)


TRAININGS: dict[str, Callable[..., Training]] = {
    "sb3-contrib's RecurrentPPO, an update": ppo,
    "the same with `reset=`": ppo,
    "neuralhydrology's CudaLSTM, a step": hydrology,
}


def build_trainings(name: str) -> tuple[Training, Training]:
    """On torch.nn and on fastrnn."""
    options = {"with_reset": True} if "reset=" in name else {}
    torch.manual_seed(0)
    theirs = TRAININGS[name](lambda module: module)
    torch.manual_seed(0)
    return theirs, TRAININGS[name](fastrnn.convert, **options)


# ---- Beside torch.nn ---------------------------------------------------------------------------------


def build(name: str) -> tuple[Model, nn.Module]:
    """A model, and the same once more, converted."""
    twice = []
    for _ in range(2):  # parametrized modules are not copied
        torch.manual_seed(0)
        twice.append(MODELS[name]())
        twice[-1].module.eval()
    return twice[0], fastrnn.convert(twice[1].module)


def difference(ours: Any, theirs: Any) -> float:
    """The largest difference, in units of the largest number of each tensor."""
    pairs = zip(tree_leaves(ours), tree_leaves(theirs), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def recurrent_calls(made: Model, module: nn.Module) -> Callable[[], None]:
    """Every call of a recurrent module within one inference, alone."""
    calls: list[tuple] = []
    handles = [
        child.register_forward_pre_hook(lambda m, args: calls.append((m, args)))
        for child in module.modules()
        if isinstance(child, RECURRENT)
    ]
    made.run(module)
    for handle in handles:
        handle.remove()

    def run() -> None:
        for child, args in calls:
            child(*args)

    return run


def parameters_apart(theirs: Training, ours: Training) -> float:
    """The largest distance between parameters after the same training, in units of their norms."""
    pairs = zip(ours.module.parameters(), theirs.module.parameters(), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs if b.norm() > 0)


def converted_classes(module: nn.Module) -> str:
    names = [type(m).__name__ for m in module.modules() if isinstance(m, RECURRENT)]
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))


def processor_time(call: Callable[[], object], repeats: int) -> float:
    """Seconds of one call on one thread, in which other processes of a busy machine have no part."""
    start = time.thread_time()
    for _ in range(repeats):
        call()
    return (time.thread_time() - start) / repeats


def ratio(torchs: Callable[[], object], ours: Callable[[], object], seconds: float) -> str:
    contenders = {"torch": torchs, "fastrnn": ours}
    timing = paired(contenders, "fastrnn", seconds, others_cpu=lambda: 0.0, turn=processor_time)
    times = timing.ratios["torch"]
    return f"**{times.median:.2f}** ({times.low:.2f}-{times.high:.2f})"


def measure(name: str, seconds: float) -> str:
    """A row of docs/models.md."""
    made, converted = build(name)
    with torch.inference_mode():
        apart = f"{difference(made.run(converted), made.run(made.module)):.0e}"
        whole = ratio(lambda: made.run(made.module), lambda: made.run(converted), seconds)
        part = ratio(recurrent_calls(made, made.module), recurrent_calls(made, converted), seconds)
    return f"| {name} | {converted_classes(converted)} | {apart} | {whole} | {part} |"


def measure_training(name: str, seconds: float) -> str:
    """A row of docs/models.md."""
    theirs, ours = build_trainings(name)
    for _ in range(3):
        theirs.step()
        ours.step()
    apart, whole = f"{parameters_apart(theirs, ours):.0e}", ratio(theirs.step, ours.step, seconds)
    return f"| {name} | {converted_classes(ours.module)} | {apart} | {whole} | |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="of the names of models, all if left out")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each figure, at least")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    load = f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(f"{cpu_model()}, one thread, torch {torch.__version__}, load {load}\n")
    print("| model | recurrent modules | difference | whole | recurrent part |\n" + "| --- " * 5 + "|")
    for name in (*MODELS, *TRAININGS):
        if options.words and not any(word in name for word in options.words):
            continue
        try:
            print((measure if name in MODELS else measure_training)(name, options.seconds), flush=True)
        except ModuleNotFoundError as missing:
            print(f"| {name} | {missing} | | | |", flush=True)
