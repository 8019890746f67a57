"""Public models, whole, converted: the results of torch.nn, and those of the packages' own code. The packages
are those of tests/models.txt (make models); a test whose package is not there is skipped."""

import models
import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastrnn


@pytest.fixture(params=models.MODELS)
def pair(request):
    try:
        return models.build(request.param)
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))


def test_converted_model_computes_what_torch_computes(pair):
    made, converted = pair
    recurrent = [m for m in converted.modules() if isinstance(m, models.RECURRENT)]
    assert recurrent
    assert all(type(m).__module__ == "fastrnn.modules" for m in recurrent)
    with torch.no_grad():
        assert models.difference(made.run(converted), made.run(made.module)) < 1e-5


def test_converted_model_computes_what_the_package_computes(pair):
    made, converted = pair
    if made.own is None:
        pytest.skip("the package itself is on torch.nn")
    with torch.no_grad():
        ours, theirs = made.run(converted), made.own()
    if same := getattr(made.module, "same", None):
        assert same(ours, theirs)
    else:
        assert models.difference(ours, theirs) < 1e-3


def test_gradients_of_every_parameter_are_those_of_torch(pair):
    made, converted = pair
    gradients = []
    for module in (made.module, converted):
        torch.manual_seed(1)
        sum((t * torch.randn_like(t)).sum() for t in tree_leaves(made.run(module))).backward()
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    theirs, ours = gradients
    assert ours.keys() == theirs.keys()
    largest = max(expected.norm() for expected in theirs.values())
    for name, expected in theirs.items():  # a leaky relu at its kink moves some of kokoro's by 2.4e-3
        assert (ours[name] - expected).norm() <= 1e-2 * expected.norm() + 1e-7 * largest, name


def test_a_model_comes_back_to_the_bit(pair):
    made, converted = pair
    with torch.no_grad():
        assert models.difference(made.run(fastrnn.to_torch(converted)), made.run(made.module)) == 0


@pytest.mark.parametrize("name", models.TRAININGS)
def test_training_goes_the_way_it_goes_on_torch(name):
    try:
        theirs, ours = models.build_trainings(name)
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    before = [p.clone() for p in ours.module.parameters()]
    for _ in range(3):
        theirs.step()
        ours.step()
    assert any(not torch.equal(p, b) for p, b in zip(ours.module.parameters(), before, strict=True))
    assert any(isinstance(m, (fastrnn.LSTM, fastrnn.GRU)) for m in ours.module.modules())
    assert models.parameters_apart(theirs, ours) < 1e-3
