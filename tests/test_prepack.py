"""prepack(): the same results from packs that are kept, and never from packs that are out of date."""

import copy
import gc
import pickle
import threading
import warnings
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from scans import CELL_NAMES, FORMS, KINDS, make_scan
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastrnn
from fastrnn import _prepack
from fastrnn._operators import given


class Operators(TorchDispatchMode):
    """The cells that were scanned, and whether their weights were packed."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.fastrnn.scan.default:
            self.names.append(args[0] + "_packed" * (args[5] is not None))
        return func(*args, **(kwargs or {}))


def operators(module, *args, **keywords):
    with torch.no_grad(), Operators() as seen:
        module(*args, **keywords)
    return seen.names


@contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def served(*args, cls=fastrnn.LSTM, **options):
    return fastrnn.prepack(cls(*args, **options).eval())


# ---- The operators -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_weights_give_the_same_bits_in_every_form(name, form, dtype):
    scan = make_scan(name, 30, 7, 50, D=2, dtype=dtype, **FORMS[form])  # rows enough to pack in each call
    packed = torch.ops.fastrnn.pack(name, *given(scan.slots))
    for save in (0, 1, 2):
        got = scan.kernel(save, packed)
        assert all(torch.equal(a, b) for a, b in zip(got, scan.kernel(save), strict=True))


@pytest.mark.parametrize("P", [None, 19])
@pytest.mark.parametrize(("T", "B"), [(1, 1), (3, 2), (1, 40), (60, 5)])
def test_packed_weights_agree_with_the_reference_with_few_rows_and_many(T, B, P):
    scan = make_scan("lstm", T, B, 45, D=2, P=P, bias=P is None)
    packed = torch.ops.fastrnn.pack("lstm", *given(scan.slots))
    got = scan.kernel(1, packed)
    for a, b in zip(got, scan.reference(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", CELL_NAMES)
@pytest.mark.parametrize("H", [1, 16, 33, 64])  # a block whole, ragged, and of one register
@pytest.mark.parametrize("B", [1, 20])
def test_bfloat16_is_the_scan_with_weights_rounded_to_it(name, H, B):
    scan = make_scan(name, 30, B, H, dtype=torch.float32)
    (scan.w_hh or scan.w_ih)[0][0, 0] = float("nan")
    packed = torch.ops.fastrnn.pack(name, *given(scan.slots), "bfloat16")
    got = scan.kernel(0, packed)
    scan.w_ih, scan.w_hh = ([w.bfloat16().float() for w in part] for part in (scan.w_ih, scan.w_hh))
    for a, b in zip(got, scan.kernel(False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", CELL_NAMES)
def test_the_operators_keep_their_promises_to_torch(name):
    scan = make_scan(name, 3, 2, 5, dtype=torch.float32)
    pack = torch.ops.fastrnn.pack.default
    torch.library.opcheck(pack, (name, *given(scan.slots), "bfloat16"))
    arguments = scan.arguments(1, pack(name, *given(scan.slots)))
    torch.library.opcheck(torch.ops.fastrnn.scan.default, arguments)


def test_what_is_no_pack_for_this_call_is_refused():
    scan = make_scan("lstm", 3, 2, 5, dtype=torch.float32)
    packed = torch.ops.fastrnn.pack("lstm", *given(scan.slots))

    def call(packed, scan=scan):
        return scan.kernel(0, packed)

    call(packed)
    foreign = packed.clone()
    foreign[:16] = torch.tensor(list(b"mmx".ljust(16, b"\0")), dtype=torch.uint8)
    for wrong in (packed[:-64], foreign, torch.zeros(4096, dtype=torch.uint8), packed.view(torch.int32)):
        with pytest.raises(RuntimeError, match="packed must be the result of fastrnn::pack for lstm"):
            call(wrong)
    with pytest.raises(RuntimeError, match="packed must be the result"):
        call(packed, scan.map(torch.Tensor.double))
    gru = make_scan("gru", 3, 2, 5, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="packed must be the result of fastrnn::pack for gru"):
        call(packed, gru)
    scan.x = torch.randn(6, 4)
    with pytest.raises(RuntimeError, match=r"x must be \[N, I\] = \[6, 3\], got \[6, 4\]"):
        call(packed)
    with pytest.raises(RuntimeError, match="only float32"):
        torch.ops.fastrnn.pack("lstm", *given(scan.map(torch.Tensor.double).slots), "bfloat16")


HEADER = 128  # bytes: 16 that name the kernels, then int64 fields, D among them


@pytest.mark.parametrize(
    ("name", "P", "storage"),
    [("lstm", None, ""), ("lstm", 4, "bfloat16"), ("gru", None, "bfloat16"), ("lstm", 4, "int8")],
)
def test_a_pack_with_one_damaged_byte_in_its_header_is_refused(name, P, storage):
    scan = make_scan(name, 3, 2, 5, P=P, dtype=torch.float32)
    packed = torch.ops.fastrnn.pack(name, *given(scan.slots), storage)
    for place in range(HEADER):
        for flips in (1, 2, 3, 0x40, 0x80, 0xFF):
            damaged = packed.clone()
            damaged[place] ^= flips
            with pytest.raises(RuntimeError, match=r"packed must be the result|must be \["):
                scan.kernel(0, damaged)


@pytest.mark.parametrize("value", [-(2**63), -(2**40), -1, 0, 1, 3, 40, 2**31, 2**40, 2**61, 2**63 - 1])
@pytest.mark.parametrize("field", range(2, HEADER // 8))
def test_a_pack_with_a_damaged_size_is_refused(field, value):
    """Even where the call and the number of bytes go with it."""
    scan = make_scan("lstm", 3, 2, 1, I=1, dtype=torch.float32)
    packed = torch.ops.fastrnn.pack("lstm", *given(scan.slots))
    before = packed[:HEADER].view(torch.int64)[field].item()
    damaged = torch.cat([packed[:HEADER], *[packed[HEADER:]] * (value if 0 < value <= 40 else 1)])
    damaged[:HEADER].view(torch.int64)[field] = value
    states = [scan.h0, torch.zeros(value, 2, 1)] if 0 < value <= 40 else [scan.h0]
    for h0 in states if value != before else ():
        with pytest.raises(RuntimeError, match=r"packed must be the result|must be \["):
            replace(scan, h0=h0, c0=h0.clone()).kernel(0, damaged)


def test_a_pack_of_two_sizes_at_once_that_overflow_is_refused():
    scan = make_scan("rnn_tanh", 3, 2, 5, dtype=torch.float32)
    packed = torch.ops.fastrnn.pack("rnn_tanh", *given(scan.slots))
    sizes = packed[:HEADER].view(torch.int64)
    sizes[(sizes == 5).nonzero().flatten()] = 2**34  # H and P: H * P is 0 in 64 bits but for the padding
    with pytest.raises(RuntimeError, match="packed must be the result"):
        scan.kernel(0, packed)


def test_a_pack_that_begins_between_two_numbers_is_refused():
    scan = make_scan("gru", 3, 2, 5, dtype=torch.float32)
    packed = torch.ops.fastrnn.pack("gru", *given(scan.slots))
    moved = torch.empty(len(packed) + 1, dtype=torch.uint8)[1:].copy_(packed)
    with pytest.raises(RuntimeError, match="packed must be aligned"):
        scan.kernel(0, moved)


# ---- Modules -----------------------------------------------------------------------------------------

MODULES = {
    "lstm": lambda: fastrnn.LSTM(6, 40, 2, bidirectional=True, dropout=0.5),
    "projection": lambda: fastrnn.LSTM(6, 40, proj_size=12),
    "gru": lambda: fastrnn.GRU(6, 40, batch_first=True, bias=False),
    "rnn": lambda: fastrnn.RNN(6, 40, nonlinearity="relu", dtype=torch.float64),
}


@pytest.mark.parametrize("kind", MODULES)
def test_a_prepacked_module_gives_the_same_bits(kind):
    module = MODULES[kind]().eval()
    x = torch.randn(25, 30, 6, dtype=module.weight_ih_l0.dtype)
    B, T = x.shape[:2] if module.batch_first else x.shape[1::-1]
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.arange(B, 0, -1).clamp(max=T), module.batch_first)
    with torch.no_grad():
        before = [module(x)[0], module(packed)[0].data, module(x, return_states=True)[0]]
        assert fastrnn.prepack(module) is module
        after = [module(x)[0], module(packed)[0].data, module(x, return_states=True)[0]]
    assert all(map(torch.equal, before, after))
    assert all(name.endswith("_packed") for name in operators(module, x))


@pytest.mark.parametrize("cls", [fastrnn.LSTMCell, fastrnn.GRUCell, fastrnn.RNNCell])
def test_cells_are_prepacked_too(cls):
    cell, x = cls(6, 40).eval(), torch.randn(3, 6)
    with torch.no_grad():
        before = cell(x)
        fastrnn.prepack(cell)
        torch.testing.assert_close(cell(x), before)
    assert [name.endswith("_packed") for name in operators(cell, x)] == [True]


def test_bfloat16_weights_round_the_weights_alone():
    module, x = fastrnn.GRU(6, 40).eval(), torch.randn(9, 30, 6)
    rounded = copy.deepcopy(module)
    with torch.no_grad():
        for name in ("weight_ih_l0", "weight_hh_l0"):
            parameter = getattr(rounded, name)
            parameter.copy_(parameter.bfloat16())
        fastrnn.prepack(module, weights=torch.bfloat16)
        assert torch.equal(module(x)[0], rounded(x)[0])
    assert "prepacked as bfloat16" in str(fastrnn.explain(module, x))


def test_explain_says_what_is_prepacked_and_what_no_longer_is():
    model = nn.Sequential(fastrnn.LSTM(4, 8), nn.Identity()).eval()
    x = torch.randn(5, 3, 4)
    assert "prepacked" not in str(fastrnn.explain(model, x))
    fastrnn.prepack(model)
    assert "prepacked" in fastrnn.explain(model, x)[0].forward
    model.train()
    assert "no longer prepacked: train() was called" in fastrnn.explain(model, x)[0].forward


def test_explain_does_not_wait_for_a_call_to_see_that_weights_have_changed():
    module, x = served(4, 8), torch.randn(5, 3, 4)
    edit_in_place(module)
    with pytest.warns(UserWarning, match="undone"):
        (layer,) = fastrnn.explain(module, x)
    assert layer.forward.endswith("no longer prepacked: the weights have changed")
    module = served(4, 8)
    assign(module)
    assert "prepacked" not in str(fastrnn.explain(module, x))


def tied_layers():
    module = fastrnn.LSTM(4, 4, 3)
    for k in (1, 2):
        setattr(module, f"weight_hh_l{k}", module.weight_hh_l0)
    return nn.Sequential(module)


def tied_directions():
    module = fastrnn.GRU(4, 4, bidirectional=True)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(module, f"{name}_l0_reverse", getattr(module, f"{name}_l0"))
    return nn.Sequential(module)


def tied_modules():
    modules = [fastrnn.GRU(4, 4) for _ in range(3)]
    modules[1].weight_hh_l0 = modules[2].weight_hh_l0 = modules[0].weight_hh_l0
    return nn.ModuleList(modules)


def same_weights():
    """All weights of two modules, a layer and a cell."""
    layer, cell = fastrnn.RNN(4, 4), fastrnn.RNNCell(4, 4, nonlinearity="relu")
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(cell, name, getattr(layer, f"{name}_l0"))
    return nn.ModuleList([layer, cell])


@pytest.mark.parametrize("make", [tied_layers, tied_directions, tied_modules, same_weights])
@pytest.mark.parametrize("change", [False, True])
@pytest.mark.filterwarnings("ignore:fastrnn. prepack")
def test_every_layer_of_shared_weights_is_prepacked_until_they_change(make, change):
    model, x = make().eval(), torch.randn(3, 4)
    with torch.no_grad():
        fastrnn.prepack(model)
        if change:
            next(model.parameters()).mul_(2)  # W_ih of the first layer
            getattr(model[-1], "weight_hh_l0", next(model.parameters())).mul_(2)
        for module in model:
            torch.testing.assert_close(module(x)[0], copy.deepcopy(module)(x)[0])
    for module in model:
        said = ["no longer" not in layer.forward for layer in fastrnn.explain(module, x)]
        used = [name.endswith("_packed") for name in operators(module, x)]
        assert said == used == [not change] * len(used)


def test_a_pack_lives_as_long_as_one_of_the_modules_that_share_it():
    layer, cell = fastrnn.prepack(same_weights().eval())
    x = torch.randn(3, 4)
    del layer
    assert operators(cell, x) == ["rnn_relu_packed"]
    packs = len(_prepack.packs)
    del cell
    assert len(_prepack.packs) == packs - 1


@torch.no_grad()
def assign(module):
    module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0 * 2)


@torch.no_grad()
def assign_a_bias(module):
    module.bias_ih_l0 = nn.Parameter(module.bias_ih_l0 + 1)


@torch.no_grad()
def edit_in_place(module):
    module.weight_ih_l0.mul_(2)


def edit_in_inference_mode(module):
    with torch.inference_mode():
        module.weight_ih_l0.mul_(2)


def load(module):
    module.load_state_dict({k: v * 2 for k, v in module.state_dict().items()})


def load_by_assignment(module):
    module.load_state_dict({k: v * 2 for k, v in module.state_dict().items()}, assign=True)


def replace_the_data(module):
    module.bias_hh_l0.data = module.bias_hh_l0.data + 1


@torch.no_grad()
def assign_a_lookalike(module):
    """Another tensor of the same memory and version, at best where the object before it lay."""
    for name in ("weight_ih_l0", "bias_ih_l0"):
        data = getattr(module, name).data
        delattr(module, name)
        module.register_parameter(name, nn.Parameter(data, requires_grad=False))
        getattr(module, name).mul_(2)


@torch.no_grad()
def make_buffers(module):
    for name in ("weight_hh_l0", "bias_hh_l0"):
        data = getattr(module, name).detach()
        delattr(module, name)
        module.register_buffer(name, data)
        getattr(module, name).mul_(2)


def replace_the_strides(module):
    module.weight_ih_l0.data = module.weight_ih_l0.data.as_strided((132, 4), (1, 132))


def vector(module):
    nn.utils.vector_to_parameters(
        torch.randn(sum(map(torch.numel, module.parameters()))), module.parameters()
    )


def optimize(module):
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(module.parameters(), lr=0.1).step()


CHANGES = [
    assign, assign_a_bias, assign_a_lookalike, make_buffers, replace_the_strides, vector, edit_in_place,
    edit_in_inference_mode, load, load_by_assignment, replace_the_data, optimize,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:fastrnn. prepack")
def test_changed_weights_take_effect_at_the_next_call(change):
    module, x = served(4, 33), torch.randn(12, 20, 4)
    change(module)
    fresh = copy.deepcopy(module)
    with torch.no_grad():
        assert torch.equal(module(x)[0], fresh(x)[0])
    assert operators(module, x) == ["lstm"]
    fastrnn.prepack(module)
    assert operators(module, x) == ["lstm_packed"]


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@torch.no_grad()
def swap(cell):
    """For a tensor of the same memory and, after the edit, the same version."""
    torch.utils.swap_tensors(cell.weight_ih, nn.Parameter(cell.weight_ih.data))
    cell.weight_ih.mul_(2)


@pytest.mark.parametrize("change", [swap, load, torch.nn.Module.double, torch.nn.Module.share_memory])
@pytest.mark.parametrize("times", [1, 2])
def test_swapped_tensors_take_effect(change, times, swapping):
    cell, x = served(4, 8, cls=fastrnn.LSTMCell), torch.randn(2, 4)
    for _ in range(times):
        change(cell)
    x = x.to(cell.weight_ih.dtype)
    with torch.no_grad(), pytest.warns(UserWarning, match="undone, because the weights have changed"):
        got = cell(x)
    assert all(map(torch.equal, got, copy.deepcopy(cell)(x)))


def test_a_layer_can_be_converted_with_swapped_tensors(swapping):
    module, x = served(4, 8, cls=fastrnn.GRU), torch.randn(3, 2, 4)
    with pytest.warns(UserWarning, match="undone"):
        assert module.double()(x.double())[0].dtype == torch.float64


@pytest.mark.filterwarnings("ignore:fastrnn. prepack")
def test_conversions_take_effect():
    module = served(4, 33)
    assert module.double()(torch.randn(3, 2, 4).double())[0].dtype == torch.float64
    module = served(4, 33)
    module.share_memory()
    assert operators(module, torch.randn(3, 2, 4)) == ["lstm"]


def test_what_cannot_be_seen_takes_effect_when_prepack_is_called_again():
    module, x = served(4, 33), torch.randn(3, 2, 4)
    with torch.no_grad():
        before = module(x)[0]
        module.weight_ih_l0.data.mul_(2)
        assert torch.equal(module(x)[0], before)
        after = copy.deepcopy(module)(x)[0]
        torch.testing.assert_close(fastrnn.prepack(module)(x)[0], after)
    assert not torch.equal(before, after)


def test_training_undoes_it():
    x = torch.randn(3, 2, 4)
    module = served(4, 8).train().eval()
    assert operators(module, x) == ["lstm"]
    module = served(4, 8)
    with pytest.warns(UserWarning, match="undone, because a call needed gradients"):
        module(x)[0].sum().backward()
    with no_warning():
        assert operators(module, x) == ["lstm"]
    assert module.weight_hh_l0.grad is not None


def test_train_computes_no_parametrized_weight():
    other = served(4, 8)
    module = nn.utils.parametrizations.spectral_norm(fastrnn.LSTM(4, 8), "weight_hh_l0")
    estimate = dict(module.named_buffers())["parametrizations.weight_hh_l0.0._u"]
    before = estimate.clone()
    module.train()
    assert torch.equal(estimate, before)
    other.train()
    assert operators(other, torch.randn(3, 2, 4)) == ["lstm"]


def test_weights_that_change_are_told_of():
    module = served(4, 8)
    edit_in_place(module)
    with torch.no_grad(), pytest.warns(UserWarning, match="undone, because the weights have changed"):
        module(torch.randn(3, 2, 4))


def test_other_weights_do_not_use_the_pack():
    module, x = served(4, 8), torch.randn(3, 2, 4)
    other = {k: v.detach() * 2 for k, v in module.named_parameters()}
    with torch.no_grad(), no_warning():
        got = torch.func.functional_call(module, other, (x,))[0]
        load(twin := copy.deepcopy(module))
        assert torch.equal(got, twin(x)[0])
    assert operators(module, x) == ["lstm_packed"]


def test_transforms_and_compilers_go_by_the_weights():
    module, x = served(4, 8), torch.randn(5, 3, 2, 4)
    with torch.no_grad():
        mapped = torch.func.vmap(lambda x: module(x)[0])(x)
        torch.testing.assert_close(mapped, torch.stack([module(one)[0] for one in x]))
        traced = torch.jit.trace(module, (x[0],))
    assert "packed" not in str(traced.inlined_graph)
    assert operators(module, x[0]) == ["lstm_packed"]


# ---- Nothing of it stays or shows --------------------------------------------------------------------


def test_state_pickle_and_copy_know_nothing_of_it():
    module = fastrnn.LSTM(4, 8).eval()
    state, pickled = list(module.state_dict()), pickle.dumps(module)
    fastrnn.prepack(module)
    assert list(module.state_dict()) == state
    assert len(pickle.dumps(module)) == len(pickled)
    x = torch.randn(3, 2, 4)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert operators(twin, x) == ["lstm"]
    fastrnn.to_torch(module)
    assert type(module) is nn.LSTM
    fastrnn.convert(module)
    assert operators(module, x) == ["lstm"]
    assert "prepacked" not in str(fastrnn.explain(module, x))


def resident_megabytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096 / 2**20


def test_a_thousand_models_leave_nothing_behind():
    def serve():
        model = served(64, 64)
        with torch.no_grad():
            model(torch.randn(2, 1, 64))

    gc.collect()
    packs = len(_prepack.packs)
    for _ in range(50):
        serve()
    gc.collect()
    before = resident_megabytes()
    for _ in range(1000):  # 0.26 MB of packs and as much of weights each
        serve()
    gc.collect()
    assert len(_prepack.packs) == packs
    assert resident_megabytes() - before < 20


def test_eight_threads_use_one_module():
    module, x = served(16, 64, cls=fastrnn.GRU), torch.randn(20, 8, 16)
    wrong = []
    with torch.no_grad():
        expected = module(x)[0]

    @torch.no_grad()
    def work():
        for _ in range(25):
            if not torch.equal(module(x)[0], expected):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- Refusals ----------------------------------------------------------------------------------------


def test_what_cannot_be_prepacked_is_said():
    with pytest.raises(RuntimeError, match=r"LSTM is in training mode, call eval\(\)"):
        fastrnn.prepack(fastrnn.LSTM(2, 3))
    with pytest.raises(ValueError, match="no fastrnn module inside"):
        fastrnn.prepack(nn.LSTM(2, 3).eval())
    with pytest.raises(
        ValueError, match=r"weights must be None, torch.bfloat16 or torch.int8, got torch.float16"
    ):
        fastrnn.prepack(fastrnn.LSTM(2, 3).eval(), torch.float16)
    with pytest.raises(ValueError, match=r"float32 modules, LSTM has torch\.float64"):
        fastrnn.prepack(fastrnn.LSTM(2, 3).double().eval(), torch.bfloat16)
    with pytest.raises(ValueError, match=r"LSTM has torch\.bfloat16 on cpu"):
        fastrnn.prepack(fastrnn.LSTM(2, 3).bfloat16().eval())
    parametrized = nn.utils.parametrizations.weight_norm(fastrnn.LSTM(2, 3), "weight_hh_l0").eval()
    with pytest.raises(ValueError, match="computed at each call"):
        fastrnn.prepack(parametrized)
