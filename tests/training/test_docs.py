"""docs/: the code of every page runs, what it says of options holds, and nothing public is left out."""

import re
from pathlib import Path

import pytest
import torch
from conftest import TEXT, language_model, trainer

import fastrnn
from fastrnn import _options, functional
from fastrnn.training import TextData

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {path.name: path.read_text() for path in sorted(DOCS.glob("*.md"))}
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A folder with a checkpoint where the tutorial's run would have left one."""
    (tmp_path / "text.txt").write_text("ROMEO: " + TEXT)
    data = TextData([str(tmp_path / "text.txt")], rows=4, k1=16)
    training = trainer(tmp_path, max_steps=1)
    training.fit(language_model(data), data)
    training.save_checkpoint(tmp_path / "runs/shakespeare/version_0/checkpoints/best.ckpt")
    return tmp_path


# The recipes need packages of their own: tests/test_recipes.py.
@pytest.mark.parametrize(
    "page", [name for name, text in PAGES.items() if BLOCK.search(text) and name != "recipes.md"]
)
def test_code_of_a_page_runs(page: str, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    namespace: dict = {}
    for code in BLOCK.findall(PAGES[page]):
        exec(compile(code, page, "exec"), namespace)


def test_every_public_name_is_in_the_documentation_of_the_api() -> None:
    api = "".join(path.read_text() for path in DOCS.glob("api/*.md"))
    assert [name for name in fastrnn.__all__ if not re.search(rf"\b{name}\b", api)] == []
    assert [name for name in functional.__all__ if not re.search(rf"\b{name}\b", api)] == []


def options() -> dict[str, str]:
    """{option: the modules that have it}, from the page's table."""
    rows = [line.split(" | ") for line in PAGES["options.md"].splitlines() if line.startswith("| `")]
    return {row[0].strip("| `").partition("=")[0]: row[1] for row in rows}


def test_every_option_is_in_the_page_of_options() -> None:
    assert _options.OPTIONS.keys() - options().keys() == set()


# Those that are no flags.
VALUES = {
    "heads": 2, "forget_bias": 1.0, "cell_clip": 1.0, "state_gradient_clip": 1.0, "weight_dropout": 0.5,
    "zoneout": 0.5, "recurrent_dropout": 0.5, "variational_dropout": 0.5, "memory": "recompute",
}  # fmt: skip


@pytest.mark.parametrize("name", _options.OPTIONS)
def test_an_option_is_of_the_modules_that_the_page_says_and_has_kernels(name: str) -> None:
    of, value = options()[name], VALUES.get(name, True)
    for cls in (fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN):
        if of.startswith(("all", "layers")) or cls.__name__ in of:
            (layer,) = fastrnn.explain(cls(4, 6, **{name: value}), torch.zeros(2, 1, 4))
            assert layer.operator is not None, cls
        else:
            with pytest.raises(TypeError, match=name):
                cls(4, 6, **{name: value})
