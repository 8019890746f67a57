"""A stack's options reach the modules by name, and what stands between layers sees valid steps alone."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import language_model, trainer
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn.training import Forecaster, InputError, LanguageModel, Stack, StateGradientNorms, TextData
from fastrnn.training.cli import Parsed, run, with_shipped_configs
from fastrnn.training.stack import NormedLayers, _entry, run_padded

T, B, I, H = 7, 4, 3, 5
LENGTHS = torch.tensor([7, 2, 5, 1])


def keywords(kind: type) -> set[str]:
    return {n for n, p in inspect.signature(kind).parameters.items() if p.kind is p.KEYWORD_ONLY}


def words(text: str) -> list[str]:
    return text.replace("-", " ").split()


# ---- Options by name ---------------------------------------------------------------------------------------


def test_each_option_of_the_modules_stands_in_the_help_with_its_own_text() -> None:
    parser = ArgumentParser()
    parser.add_argument("--stack", type=Stack)
    shown = " ".join(words(parser.format_help()))
    documented = inspect.getdoc(fastrnn.LSTM) or ""
    names = (keywords(fastrnn.LSTM) | keywords(fastrnn.GRU) | keywords(fastrnn.RNN)) - {"forget_bias"}
    assert names >= {"zoneout", "layer_norm", "memory", "heads"}
    for name in names:
        text = documented.split(f"\n    {name}: ")[1].split(". ")[0].split(" (")[0]
        assert f"stack.options.{name} " in shown
        assert " ".join(words(text))[:60] in shown


@pytest.mark.parametrize(
    "docstring",
    [
        "Args:\n    other: o.\n    zoneout: p in [0, 1),\n        as in the paper.\n    heads: n.",
        "Keyword Arguments:\n  heads, zoneout: p in [0, 1),\n    as in the paper.\n\nReturns:\n  zoneout.",
    ],
)
def test_the_help_of_an_option_is_found_under_any_heading(docstring: str) -> None:
    assert _entry(docstring, "zoneout") == "p in [0, 1), as in the paper."
    assert _entry(docstring, "memory") == _entry("", "zoneout") == ""


def test_training_is_imported_without_docstrings() -> None:
    code = "from fastrnn.training import Stack; print(Stack(options={'zoneout': 0.1}).build(2))"
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, check=False)
    assert "zoneout=0.1" in done.stdout, done.stderr


def test_options_of_the_command_line_are_those_of_the_module() -> None:
    given = ["layer_norm=true", "zoneout=[0.1, 0.2]", "memory=recompute", "bias=false"]
    argv = ["fit", "--config", "japanese_vowels", *(f"--model.stack.options.{option}" for option in given)]
    config = run(with_shipped_configs(argv), Parsed).config["fit"]
    stack = config.model.init_args.stack
    module = Stack(**{**stack.as_dict(), "bidirectional": False}).build(I)
    assert isinstance(module, fastrnn.LSTM)
    assert module._fused_options == {"layer_norm": True, "zoneout": (0.1, 0.2), "memory": "recompute"}
    assert not module.bias
    with pytest.raises(InputError, match=r"stack: Option 'options\.nonsense' is not accepted"):
        run(with_shipped_configs([*argv, "--model.stack.options.nonsense=1"]), Parsed)


def test_options_keep_their_form_in_a_checkpoint_and_out_of_it() -> None:
    stack = Stack(options={"zoneout": 0.1, "peephole": None})
    assert stack.options == {"zoneout": 0.1}
    assert Stack(**vars(stack)) == stack


@pytest.mark.parametrize("task", [LanguageModel, Forecaster])
def test_a_reversed_stack_sees_the_future(task: type) -> None:
    spec = {"symbols": 3} if task is LanguageModel else {"mean": [0.0], "scale": [1.0], "outputs": 1}
    with pytest.raises(InputError, match="cannot be bidirectional or reversed"):
        task(spec, Stack(options={"reverse": True}))


def test_layers_with_options_between_the_steps_are_heard() -> None:
    rnn = Stack(hidden_size=H, options={"zoneout": 0.1}).build(I)
    with StateGradientNorms(rnn) as norms:
        rnn(torch.randn(T, B, I))[0].sum().backward()
        assert set(norms.take()) == {"h layer 1", "c layer 1"}


# ---- Between layers ----------------------------------------------------------------------------------------


def normed(norm: str, **changes: Any) -> NormedLayers:
    torch.manual_seed(1)
    rnn = Stack(**{"hidden_size": H, "num_layers": 2, "norm": norm, **changes}).build(I)
    assert isinstance(rnn, NormedLayers)
    for parameter in rnn.norms.parameters():
        nn.init.normal_(parameter)
    return rnn


def by_hand(rnn: NormedLayers, x: Tensor, batch: bool) -> list[Tensor]:
    """y of each sequence by itself; statistics of batch normalisation over all their steps."""
    rows = [x[:n, b : b + 1] for b, n in enumerate(LENGTHS)]
    first = [rnn.layers[0](row)[0] for row in rows]
    together, norm = torch.cat(first), rnn.norms[0]
    dims = (0, 1) if batch else (-1,)
    found = []
    for part in first:
        source = together if batch else part
        mean, variance = source.mean(dims, keepdim=True), source.var(dims, unbiased=False, keepdim=True)
        part = (part - mean) / torch.sqrt(variance + 1e-5) * norm.weight + norm.bias
        found.append(rnn.layers[1](part)[0].squeeze(1))
    return found


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_each_layer_sees_valid_steps_normalised(norm: str, bidirectional: bool, cell: str) -> None:
    rnn = normed(norm, cell=cell, bidirectional=bidirectional)
    x = torch.randn(T, B, I)
    y, _ = run_padded(rnn, x, LENGTHS)
    expected = by_hand(rnn, x, norm == "batch")
    for b, n in enumerate(LENGTHS):
        torch.testing.assert_close(y[:n, b], expected[b])
        assert not y[n:, b].any()
    if norm == "batch":
        first, _ = rnn.layers[0](pack_padded_sequence(x, LENGTHS, enforce_sorted=False))
        torch.testing.assert_close(rnn.norms[0].running_mean, 0.1 * first.data.mean(0))
    poisoned = x.clone()
    poisoned[2:, 1] = torch.nan
    gradients = [
        torch.autograd.grad(run_padded(rnn, given, LENGTHS)[0].sum(), list(rnn.parameters()))
        for given in (x, poisoned)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_states_go_on_from_chunk_to_chunk(cell: str) -> None:
    rnn = normed("batch", cell=cell, num_layers=3).eval()
    x = torch.randn(T, B, I)
    y, last = rnn(x)
    first, state = rnn(x[:3])
    second, state = rnn(x[3:], state)
    torch.testing.assert_close((torch.cat((first, second)), state), (y, last))
    assert (state[0] if cell == "lstm" else state).shape == (3, B, H)


def test_dropout_stands_between_layers_in_training_alone() -> None:
    rnn, x = normed("layer", dropout=0.5), torch.randn(T, B, I)
    assert not torch.equal(rnn(x)[0], rnn(x)[0])
    rnn.eval()
    assert torch.equal(rnn(x)[0], rnn(x)[0])


def test_forget_gates_begin_open_in_every_layer() -> None:
    rnn = Stack(hidden_size=H, num_layers=2, norm="batch", forget_bias=50.0).build(I)
    for layer in rnn.layers:  # type: ignore[union-attr]
        assert (layer.bias_hh_l0[H : 2 * H] > 40).all()
        assert (layer.bias_hh_l0[:H] < 1).all()


def test_a_model_trains_with_it_and_goes_on_from_its_checkpoint(text: TextData, tmp_path: Path) -> None:
    stack = Stack(hidden_size=8, num_layers=2, norm="batch", options={"layer_norm": True})
    model = LanguageModel(text.spec, stack, embedding_size=4)
    batch = next(iter(text.batches("train", 0, 1)))
    before = model.loss_of(batch).item()
    fit = trainer(tmp_path, max_steps=30, enable_checkpointing=True, limit_val_batches=0)
    fit.fit(model, text)
    path = tmp_path / "model.ckpt"
    fit.save_checkpoint(path)
    model.eval()
    again = LanguageModel.load_from_checkpoint(path).eval()
    assert again.stack == stack
    assert again.loss_of(batch).item() == pytest.approx(model.loss_of(batch).item())
    assert model.loss_of(batch).item() < before
    other = language_model(text)
    with pytest.raises(InputError, match=r"stack\.norm is 'batch' there, 'none' here"):
        trainer(tmp_path, max_steps=31, limit_val_batches=0).fit(other, text, ckpt_path=str(path))


@pytest.mark.parametrize(
    ("stack", "words"),
    [
        ({"norm": "group", "num_layers": 2}, "stack.norm must be one of none, batch, layer, got 'group'"),
        ({"norm": "batch"}, "stack.norm=batch stands between layers, and stack.num_layers is 1"),
        ({"options": {"zoneout": 2}}, r"zoneout should be a number in range \[0, 1\), got 2"),
    ],
)
def test_what_cannot_be_is_refused_by_name_and_value(stack: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Stack(**stack).build(I)
