"""Docstrings of the public names: their examples run, and the parameters are as they say."""

import doctest
import re

import pytest

import fastrnn
from fastrnn import functional, minimal, modules, more

CLASSES = [*modules.__all__, *more.__all__, *minimal.__all__]
FUNCTIONS = [functional.lstm, functional.linear_scan]


@pytest.mark.parametrize("named", [*(getattr(fastrnn, name) for name in CLASSES), *FUNCTIONS])
def test_the_example_in_a_docstring_runs(named):
    (example,) = doctest.DocTestFinder(recurse=False).find(named, named.__name__, globs={})
    result = doctest.DocTestRunner().run(example)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", CLASSES)
def test_parameters_have_the_shapes_in_the_docstring(name):
    """``names: [shape]``, or ``names: [shape], from the second layer on [shape]``."""
    cls, sizes, options = getattr(fastrnn, name), {"I": 3, "H": 5, "P": 5, "D": 2}, {}
    if not name.endswith("Cell"):
        options = {"num_layers": 2, "bidirectional": True}
    if name == "LSTM":
        options["proj_size"] = sizes["P"] = 2
    if name == "LayerNormGRU":
        options["bias"] = True
    if name == "SLSTM":
        options["heads"] = sizes["heads"] = 5
    for parameter, tensor in cls(3, 5, **options).named_parameters():
        documented = re.sub(r"_l\d(_reverse)?$", "_l{k}", parameter)
        rows = re.compile(rf"\s+([\w{{}}]+, )*{re.escape(documented)}(, [\w{{}}]+)*: \[")
        line = next(line for line in cls.__doc__.splitlines() if rows.match(line))
        shapes = re.findall(r"\[.*?\]", line)
        assert list(tensor.shape) == eval(shapes[-1 if "_l1" in parameter else 0], dict(sizes)), parameter
