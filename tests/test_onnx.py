"""torch.onnx.export writes the layers as ONNX's nodes LSTM, GRU and RNN, whose results are the modules'."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

import fastrnn
import fastrnn.onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.filterwarnings("ignore")
DYNAMIC = torch.export.Dim.DYNAMIC
T, B, I, H = 5, 3, 3, 4
STACK = {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False}


class Call(nn.Module):
    """A call of a module as a model of its own."""

    def __init__(self, module, call):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x):
        return self.call(self.module, x)


class Lengths(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, h, lengths):
        return self.module(x, (h, h.sin()) if isinstance(self.module, nn.LSTM) else h, lengths=lengths)


def export(model, args, path, dynamo, dynamic):
    """dynamic: {dimension: name} of each argument."""
    model.eval()
    options = {}
    if dynamo:
        options["dynamic_shapes"] = tuple(dict.fromkeys(of, DYNAMIC) for of in dynamic)
        options["verbose"] = False
    else:
        options["input_names"] = [f"x{k}" for k in range(len(args))]
        options["dynamic_axes"] = {f"x{k}": of for k, of in enumerate(dynamic)}
    with torch.no_grad():
        torch.onnx.export(model, args, str(path), dynamo=dynamo, **options)
    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    return proto


def nodes(proto):
    return [node for node in proto.graph.node if node.op_type in ("LSTM", "GRU", "RNN")]


def attributes(node):
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def assert_equal_in_onnxruntime(model, path, *calls):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for args in calls:
        named = {i.name: a.numpy() for i, a in zip(session.get_inputs(), args, strict=True)}
        with torch.no_grad():
            expected = tree_leaves(model(*args))
        found = [torch.from_numpy(y) for y in session.run(None, named)]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("LSTM", {}), ("GRU", {}), *((kind, STACK) for kind in ("LSTM", "GRU", "RNN"))],
)
def test_a_layer_is_one_standard_node_at_any_batch_and_length(kind, options, dynamo, tmp_path):
    module = getattr(fastrnn, kind)(I, H, **options)
    x, other = torch.randn(T, B, I), torch.randn(T + 2, B + 1, I)
    proto = export(module, (x,), tmp_path / "m.onnx", dynamo, [{0: "t", 1: "b"}])
    found = nodes(proto)
    assert [node.op_type for node in found] == [kind] * module.num_layers
    weights = {t.name for t in proto.graph.initializer} | {
        output for node in proto.graph.node if node.op_type == "Constant" for output in node.output
    }
    for node in found:
        assert node.domain == ""
        assert attributes(node)["hidden_size"] == H
        assert attributes(node)["direction"] == (
            b"bidirectional" if "bidirectional" in options else b"forward"
        )
        assert kind != "GRU" or attributes(node)["linear_before_reset"] == 1
        assert {node.input[1], node.input[2]} <= weights  # in the order of ONNX's gates already
    assert_equal_in_onnxruntime(module, tmp_path / "m.onnx", (x,), (other,))


BACK = {"reverse": True, "batch_first": True}


@pytest.mark.parametrize(
    ("kind", "options", "dynamo"),
    [(kind, options, False) for kind in ("LSTM", "GRU", "RNN") for options in ({"bidirectional": True}, BACK)]
    + [("LSTM", {"bidirectional": True}, True), ("GRU", BACK, True)],
)
def test_lengths_are_sequence_lens_with_states_zeros_included(kind, options, dynamo, tmp_path):
    model, D = Lengths(getattr(fastrnn, kind)(I, H, **options)), 1 + ("bidirectional" in options)

    def arguments(T, lengths):
        x = torch.randn(T, len(lengths), I)
        x = x.transpose(0, 1).contiguous() if "batch_first" in options else x
        return x, torch.randn(D, len(lengths), H), torch.tensor(lengths)

    first, second = arguments(5, [5, 0, 2]), arguments(7, [0, 7, 3, 1])
    proto = export(model, first, tmp_path / "m.onnx", dynamo, [{0: "p", 1: "q"}, {1: "b"}, {0: "b"}])
    (node,) = nodes(proto)
    assert node.input[4]  # sequence_lens
    assert_equal_in_onnxruntime(model, tmp_path / "m.onnx", first, second)


OTHERS = {
    "peephole": (lambda: fastrnn.LSTM(I, H, peephole=True, bidirectional=True), None),
    "coupled": (lambda: fastrnn.LSTM(I, H, coupled=True), None),
    "relu": (lambda: fastrnn.RNN(I, H, nonlinearity="relu"), None),
    "IndRNN": (lambda: fastrnn.IndRNN(I, H), None),
    "every state": (lambda: fastrnn.GRU(I, H, 2), lambda m, x: m(x, return_states=True)),
    "LSTMCell": (lambda: fastrnn.LSTMCell(I, H), lambda m, x: m(x[1], m(x[0]))),
    "GRUCell": (lambda: fastrnn.GRUCell(I, H), lambda m, x: m(x[1], m(x[0]))),
    "alone": (lambda: fastrnn.GRU(I, H), lambda m, x: m(x[:, 0])),
    "heads": (lambda: fastrnn.GRU(I, H, heads=2), None),
}


@pytest.mark.parametrize(
    ("name", "dynamo"),
    [(name, False) for name in OTHERS]
    + [(name, True) for name in ("heads", "coupled", "IndRNN", "LSTMCell")],
)
def test_what_else_onnx_has_is_written(name, dynamo, tmp_path):
    make, call = OTHERS[name]
    model = make() if call is None else Call(make(), call)
    x, other = torch.randn(T, B, I), torch.randn(T + 2, B + 1, I)
    assert nodes(export(model, (x,), tmp_path / "m.onnx", dynamo, [{0: "t", 1: "b"}]))
    assert_equal_in_onnxruntime(model, tmp_path / "m.onnx", (x,), (other,))


RESET = torch.zeros(T, B, dtype=torch.bool)
REFUSED = {
    "reset": (lambda: fastrnn.LSTM(I, H), lambda m, x: m(x, reset=RESET)),
    "return_states": (lambda: fastrnn.LSTM(I, H), lambda m, x: m(x, return_states=True)),
    "proj_size": (lambda: fastrnn.LSTM(I, H, proj_size=2), lambda m, x: m(x)),
    "layer_norm": (lambda: fastrnn.LSTM(I, H, layer_norm=True), lambda m, x: m(x)),
    "zoneout and cell_clip": (lambda: fastrnn.LSTM(I, H, zoneout=0.1, cell_clip=1), lambda m, x: m(x)),
    "SLSTM": (lambda: fastrnn.SLSTM(I, H), lambda m, x: m(x)),
    "linear scan": (lambda: fastrnn.MinGRU(I, H), lambda m, x: m(x)),
}


@pytest.mark.parametrize(
    ("name", "dynamo"),
    [(name, False) for name in REFUSED] + [("reset", True), ("zoneout and cell_clip", True)],
)
def test_what_onnx_has_not_is_refused_by_name(name, dynamo, tmp_path):
    make, call = REFUSED[name]
    with pytest.raises(Exception, match=rf"fastrnn: torch\.onnx\.export .*{name}"):
        export(Call(make(), call), (torch.randn(T, B, I),), tmp_path / "m.onnx", dynamo, [{}])


@pytest.mark.parametrize(
    ("dtype", "dynamo"), [(torch.float16, False), (torch.float16, True), (torch.float64, False)]
)
def test_number_types_without_kernels_are_nodes_too(dtype, dynamo, tmp_path):
    module = fastrnn.GRU(I, H, dtype=dtype)
    proto = export(module, (torch.randn(T, B, I, dtype=dtype),), tmp_path / "m.onnx", dynamo, [{}])
    assert len(nodes(proto)) == 1


def test_the_exported_program_computes_what_the_file_computes():
    for module in (
        fastrnn.LSTM(I, H, 2, bidirectional=True, peephole=True),
        fastrnn.GRU(I, H),
        fastrnn.RNN(I, H, nonlinearity="relu"),
    ):
        x = torch.randn(T, B, I)
        program = torch.onnx.export(module.eval(), (x,), dynamo=True, verbose=False).exported_program
        torch.testing.assert_close(program.module()(x), module(x))


def test_a_packed_sequence_is_torchs_to_the_older_exporter(tmp_path):
    model = Call(
        fastrnn.GRU(I, H),
        lambda m, x: pad_packed_sequence(m(pack_padded_sequence(x, torch.tensor([5, 3, 2])))[0])[0],
    )
    x = torch.randn(T, B, I)
    assert nodes(export(model, (x,), tmp_path / "m.onnx", False, [{}]))
    assert_equal_in_onnxruntime(model, tmp_path / "m.onnx", (x,))


def test_an_export_warns_of_nothing_of_fastrnns():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        torch.onnx.export(fastrnn.LSTM(I, H).eval(), (torch.randn(T, B, I),), "/dev/null", dynamo=False)
    assert not [w for w in caught if "fastrnn" in str(w.message)]


@pytest.mark.parametrize("grad", [True, False])
def test_a_program_that_torch_has_exported_before_becomes_nodes_too(grad, tmp_path):
    model = Lengths(fastrnn.LSTM(I, H, 2, peephole=True, batch_first=True)).eval()
    first = torch.randn(B, T, I), torch.randn(2, B, H), torch.tensor([5, 0, 2])
    second = torch.randn(B + 1, T + 1, I), torch.randn(2, B + 1, H), torch.tensor([6, 0, 2, 1])
    with torch.set_grad_enabled(grad):
        dynamic = {0: DYNAMIC, 1: DYNAMIC}, {1: DYNAMIC}, {0: DYNAMIC}
        program = torch.export.export(model, first, dynamic_shapes=dynamic)
    program = program.run_decompositions(fastrnn.onnx.decompositions())
    torch.testing.assert_close(program.module()(*second), model(*second))
    torch.onnx.export(program, (), str(tmp_path / "m.onnx"), dynamo=True, verbose=False)
    assert len(nodes(onnx.load(tmp_path / "m.onnx"))) == 2
    assert_equal_in_onnxruntime(model, tmp_path / "m.onnx", first, second)


@pytest.mark.parametrize("grad", [True, False])
def test_such_a_program_with_every_state_of_an_lstm_is_refused_by_name(grad, tmp_path):
    model = Call(fastrnn.LSTM(I, H), lambda m, x: m(x, return_states=True)).eval()
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (torch.randn(T, B, I),))

    def to_onnx():
        decomposed = program.run_decompositions(fastrnn.onnx.decompositions())
        torch.onnx.export(decomposed, (), str(tmp_path / "m.onnx"), dynamo=True, verbose=False)

    with pytest.raises(Exception, match=r"return_states.of.an.LSTM"):
        to_onnx()
