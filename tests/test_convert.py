"""convert() and to_torch(): parametrized modules, subclasses, replaced forwards, and what is left."""

import copy
import functools
import inspect
import pickle
import subprocess
import sys
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastrnn

KINDS = ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]


def make_input(kind):
    return torch.randn(*((2, 3) if kind.endswith("Cell") else (5, 2, 3)))


@pytest.fixture
def kernels(monkeypatch):
    """Counts the calls that fastrnn's kernels get."""
    calls = []

    def count(module, name):
        function = getattr(module, name)

        def counted(*args):
            result = function(*args)
            if result is not None:  # _direct.run leaves some to the operators
                calls.append(1)
            return result

        monkeypatch.setattr(module, name, counted)

    count(fastrnn._direct, "run")
    count(fastrnn._autograd, "scan")
    return calls


def quietly(function, model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(model)


# ---- Parametrized modules and subclasses ---------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_parametrized_module_is_converted_and_back(kind, kernels):
    weight = "weight_hh" if kind.endswith("Cell") else "weight_hh_l0"
    module = parametrizations.weight_norm(getattr(nn, kind)(3, 4), weight)
    x = make_input(kind)
    parameters = dict(module.named_parameters())
    quietly(fastrnn.convert, nn.Sequential(module))
    assert isinstance(module, getattr(fastrnn, kind))
    ours = module(x)
    assert kernels
    twin = copy.deepcopy(module)
    torch.testing.assert_close(twin(x), ours)
    quietly(fastrnn.to_torch, module)
    assert not isinstance(module, getattr(fastrnn, kind))
    torch.testing.assert_close(module(x), ours)
    assert all(p is parameters[name] for name, p in module.named_parameters())
    parametrize.remove_parametrizations(module, weight)
    assert type(module) is getattr(nn, kind)
    parametrize.remove_parametrizations(twin, weight)
    assert type(twin) is getattr(fastrnn, kind)


class Mine(nn.LSTM):
    """Keeps torch.nn's forward."""

    def __init__(self, *args, forget_bias=1.0, **keywords):
        self.forget_bias = forget_bias
        super().__init__(*args, **keywords)

    def reset_parameters(self):
        super().reset_parameters()
        with torch.no_grad():
            self.bias_hh_l0[self.hidden_size : 2 * self.hidden_size] = self.forget_bias


class MineToo(Mine):
    pass


@pytest.mark.parametrize("cls", [Mine, MineToo])
def test_a_subclass_that_keeps_the_forward_is_converted_and_back(cls, kernels):
    module = cls(3, 4, forget_bias=2.0)
    x = make_input("LSTM")
    expected = module(x)
    quietly(fastrnn.convert, nn.Sequential(module))
    assert isinstance(module, cls)
    assert isinstance(module, fastrnn.LSTM)
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        kernels.clear()
        assert type(twin) is type(module)
        torch.testing.assert_close(twin(x), expected)
        assert kernels
    module.reset_parameters()
    assert (module.bias_hh_l0[4:8] == 2.0).all()
    parametrized = quietly(fastrnn.convert, parametrizations.weight_norm(cls(3, 4), "weight_hh_l0"))
    assert isinstance(parametrized, fastrnn.LSTM)
    for changed in (module, parametrized):
        quietly(fastrnn.to_torch, changed)
        assert isinstance(changed, cls)
        assert not isinstance(changed, fastrnn.LSTM)
        changed(x)
    assert type(module) is cls


class OwnForward(nn.GRU):
    def forward(self, x):
        return super().forward(x * 2)


class OwnNames(nn.RNN):
    def _weights(self):
        return "mine"


class OfOurs(fastrnn.GRU):
    pass


def test_what_is_left_is_said_by_name_with_the_reason():
    model = nn.ModuleDict({"a": OwnForward(3, 4), "b": nn.Sequential(OwnNames(3, 4)), "c": nn.LSTM(3, 4)})
    with pytest.warns(
        UserWarning, match=r"convert\(\).*a \(OwnForward .*forward.*b\.0 \(OwnNames.*_weights"
    ) as caught:
        fastrnn.convert(model)
    assert [w.filename for w in caught] == [__file__]
    assert type(model["a"]) is OwnForward
    assert type(model["b"][0]) is OwnNames
    assert type(model["c"]) is fastrnn.LSTM
    model = nn.ModuleDict(
        {"d": OfOurs(3, 4), "e": parametrizations.weight_norm(OfOurs(3, 4), "weight_hh_l0")}
    )
    with pytest.warns(UserWarning, match=r"to_torch\(\).*d \(OfOurs.*e \(OfOurs"):
        fastrnn.to_torch(model)
    assert type(model["d"]) is OfOurs
    with pytest.warns(UserWarning, match="the module itself"):
        fastrnn.to_torch(model["d"])
    assert quietly(fastrnn.convert, model) is model  # fastrnn's already


def test_quantized_modules_are_strangers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(3, 4)), {nn.LSTM})
    kind = type(quantized[0])
    assert type(quietly(fastrnn.convert, quantized)[0]) is kind


# ---- A forward that has been replaced on the module ----------------------------------------------------


def accelerates(module):
    """As accelerate's add_hook_to_module does."""
    module._old_forward = old = module.forward

    def new_forward(module, *args, **keywords):
        return module._old_forward(*args, **keywords)

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), old)


def closure(module):
    old = module.forward
    module.forward = lambda *args: old(*args)


def wrapper(module):
    old = module.forward

    @functools.wraps(old)
    def forward(*args):
        return old(*args)

    module.forward = forward


def method(module):
    old = module.forward
    module.forward = types.MethodType(lambda self, *args: old(*args), module)


def given(module):
    module.forward = functools.partial(lambda old, *args: old(*args), module.forward)


def itself(module):
    module.forward = module.forward


def twice(module):
    closure(module)
    accelerates(module)


@pytest.mark.parametrize("replace", [accelerates, closure, wrapper, method, given, itself, twice])
@pytest.mark.parametrize("kind", KINDS)
def test_a_replaced_forward_calls_that_of_the_new_class(kind, replace, kernels):
    x = make_input(kind)
    module = getattr(nn, kind)(3, 4)
    expected = module(x)
    replace(module)
    quietly(fastrnn.convert, nn.Sequential(module))
    torch.testing.assert_close(module(x), expected)
    assert len(kernels) == 1
    assert fastrnn.explain(module, x)[0].operator is not None
    kernels.clear()
    quietly(fastrnn.to_torch, module)
    torch.testing.assert_close(module(x), expected)
    assert not kernels


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_that_calls_no_other_is_left_and_said(kind):
    module = getattr(nn, kind)(3, 4)
    module.forward = lambda x: "mine"
    with pytest.warns(UserWarning, match="replaced"):
        fastrnn.convert(module)
    assert type(module) is getattr(nn, kind)
    assert module(None) == "mine"


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_of_fastrnns_that_is_kept_elsewhere_is_torch_nns_after_to_torch(kind, kernels):
    module = getattr(fastrnn, kind)(3, 4)
    x = make_input(kind)
    expected, kept = module(x), [module.forward]
    module.forward = lambda *args: kept[0](*args)
    fastrnn.to_torch(module)
    kernels.clear()
    torch.testing.assert_close(module(x), expected)
    assert not kernels


# ---- What is said --------------------------------------------------------------------------------------


def test_what_is_converted_is_printed_when_asked_for(capsys):
    model = nn.ModuleDict({"a": nn.ModuleList([nn.LSTM(3, 4)]), "b": Mine(3, 4), "c": nn.Linear(3, 4)})
    fastrnn.convert(model, verbose=True)
    fastrnn.to_torch(model["a"], verbose=True)
    assert capsys.readouterr().out.splitlines() == [
        "fastrnn: convert() turns a.0 from torch.nn.LSTM into fastrnn.LSTM",
        f"fastrnn: convert() turns b from {__name__}.Mine into {__name__}.Mine",
        "fastrnn: to_torch() turns 0 from fastrnn.LSTM into torch.nn.LSTM",
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_torch_has_scripted_is_said():
    model = nn.ModuleDict({"a": torch.jit.script(nn.Sequential(nn.LSTM(3, 4))), "b": nn.GRU(3, 4)})
    with pytest.warns(UserWarning, match=r"convert\(\).*a\.0 \(torch\.jit\.script.*before"):
        fastrnn.convert(model)
    assert type(model["b"]) is fastrnn.GRU


# ---- patch() -------------------------------------------------------------------------------------------


@pytest.fixture
def unpatched():
    yield
    assert fastrnn.patch._count == 0
    assert type(nn.LSTM(3, 4)) is nn.LSTM


@pytest.mark.usefixtures("unpatched")
@pytest.mark.parametrize("kind", KINDS)
def test_patched_constructors_make_fastrnns_modules(kind, kernels):
    theirs, x = getattr(nn, kind), make_input(kind)

    class Sub(theirs):
        def __init__(self, size):
            super().__init__(3, size, bias=False)

    before, signature = theirs(3, 4), inspect.signature(theirs)
    with fastrnn.patch():
        assert inspect.signature(theirs) == signature
        module, sub = theirs(3, 4), Sub(4)
        assert type(module) is getattr(fastrnn, kind)
        assert isinstance(sub, Sub)
        assert isinstance(sub, getattr(fastrnn, kind))
        assert not isinstance(copy.deepcopy(before), getattr(fastrnn, kind))
    assert type(theirs(3, 4)) is theirs
    before.load_state_dict(module.state_dict())
    kernels.clear()
    torch.testing.assert_close(module(x), before(x))
    assert len(kernels) == 1
    assert type(pickle.loads(pickle.dumps(before))) is theirs
    quietly(fastrnn.to_torch, nn.Sequential(sub))
    assert type(sub) is Sub


@pytest.mark.usefixtures("unpatched")
@pytest.mark.parametrize("kind", KINDS)
def test_patched_functions_serve_torch_nns_modules_and_direct_calls(kind, kernels):
    class Mine(getattr(nn, kind)):
        def forward(self, x):
            return super().forward(x * 2)

    x, module = make_input(kind), Mine(3, 4)
    expected = module(x)
    assert not kernels
    with fastrnn.patch(), fastrnn.patch():
        pass
    module(x)
    assert not kernels
    with fastrnn.patch():
        with fastrnn.patch():
            pass
        torch.testing.assert_close(module(x), expected)
        assert len(kernels) == 1
        if kind == "GRU":
            packed = nn.utils.rnn.pack_padded_sequence(x, [5, 3])
            h = torch.zeros(1, 2, 4)
            torch._VF.gru(packed.data, packed.batch_sizes, h, module._flat_weights, True, 1, 0.0, True, False)
            assert len(kernels) == 2
    torch.testing.assert_close(module(x), expected)


def test_patch_leaves_torch_nns_modules_whole():
    """What copies a module without its constructor, DataParallel for one, works after patch() as before."""
    module = nn.LSTM(3, 4)
    with fastrnn.patch():
        for again in (module._replicate_for_data_parallel(), copy.deepcopy(module), copy.copy(module)):
            assert type(again) is nn.LSTM
    assert type(module._replicate_for_data_parallel()) is nn.LSTM
    assert type(nn.LSTM(3, 4)) is nn.LSTM


def test_a_plain_call_of_patch_stays():
    script = """
import fastrnn, torch
from torch.nn import LSTM
fastrnn.patch()
assert type(LSTM(3, 4)) is fastrnn.LSTM
y, _ = torch.compile(LSTM(3, 4), backend="eager", fullgraph=True)(torch.randn(5, 2, 3))
assert y.shape == (5, 2, 4)
fastrnn.functional.SUMMED_IN_FLOAT32 = ()
half = LSTM(3, 4).bfloat16()  # then takes torch.nn's own path, which calls the patched function
assert half(torch.randn(5, 2, 3).bfloat16())[0].shape == (5, 2, 4)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
