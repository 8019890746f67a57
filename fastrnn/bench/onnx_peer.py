"""ONNX Runtime as a peer: the same weights in ONNX LSTM, GRU or RNN nodes, for inference.

It needs the optional packages ``onnx`` and ``onnxruntime``, so it is imported only when the peer is
asked for.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from fastrnn.bench.cases import Case
from fastrnn.bench.workload import Workload

# ONNX gate k is torch gate ORDER[k]: torch LSTM i f g o -> i o f c, torch GRU r z n -> z r h.
ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
OPSET, IR_VERSION = 17, 9


def supports(case: Case) -> bool:
    return case.group in ("dense", "step", "stack")


def make_call(workload: Workload, threads: int) -> Callable[[], list[np.ndarray]]:
    """A call of ONNX Runtime that returns y [T, B, D*H] and the final states [L*D, B, H]."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Otherwise its worker threads go on spinning in the other contenders' turns.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        build_model(workload.module), options, providers=["CPUExecutionProvider"]
    )
    assert isinstance(workload.x, Tensor)
    feeds = {"x": workload.x.detach().numpy()}
    feeds.update({f"s{k}": state.detach().numpy() for k, state in enumerate(workload.states)})
    return lambda: session.run(None, feeds)


def build_model(module: nn.Module) -> bytes:
    """``module`` (LSTM, GRU or RNN with tanh, unprojected) as a serialised ONNX model.

    Inputs x [T, B, I] and s0 (h0) and s1 (c0) [L*D, B, H]; outputs y and the final states.
    """
    assert isinstance(module, nn.RNNBase)
    op, H = module.mode.removesuffix("_TANH"), module.hidden_size
    D, L = (2 if module.bidirectional else 1), module.num_layers
    states = 2 if op == "LSTM" else 1
    direction = "bidirectional" if D == 2 else "forward"
    constants = {"joined": np.array([0, 0, -1], np.int64), "split": np.full(L, D, np.int64)}
    nodes = [
        helper.make_node("Split", [f"s{k}", "split"], [f"s{k}_{layer}" for layer in range(L)], axis=0)
        for k in range(states)
    ]
    y = "x"
    for layer in range(L):
        weights = [f"{name}_{layer}" for name in ("W", "R", "B")]
        constants.update(zip(weights, layer_weights(module, op, layer), strict=True))
        initial = [f"s{k}_{layer}" for k in range(states)]
        final = [f"f{k}_{layer}" for k in range(states)]
        extra: dict[str, Any] = {"linear_before_reset": 1} if op == "GRU" else {}
        output = "y" if layer == L - 1 else f"y_{layer}"
        nodes += [
            helper.make_node(
                op, [y, *weights, "", *initial], [f"o_{layer}", *final],
                hidden_size=H, direction=direction, **extra,
            ),  # o: [T, D, B, H]
            helper.make_node("Transpose", [f"o_{layer}"], [f"t_{layer}"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", [f"t_{layer}", "joined"], [output]),
        ]  # fmt: skip
        y = output
    finals = [f"f{k}" for k in range(states)]
    nodes += [
        helper.make_node("Concat", [f"{name}_{layer}" for layer in range(L)], [name], axis=0)
        for name in finals
    ]
    graph = helper.make_graph(
        nodes, "rnn",
        [_value(name) for name in ("x", *(f"s{k}" for k in range(states)))],
        [_value(name) for name in ("y", *finals)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString()


def layer_weights(module: nn.RNNBase, op: str, layer: int) -> tuple[np.ndarray, ...]:
    """W [D, G*H, I], R [D, G*H, H] and B [D, 2*G*H] of a layer, gates in ONNX's order."""

    def reorder(name: str) -> Tensor:
        gates = getattr(module, name).detach().chunk(len(ORDER[op]))
        return torch.cat([gates[k] for k in ORDER[op]])

    ends = (f"l{layer}", f"l{layer}_reverse") if module.bidirectional else (f"l{layer}",)
    W = [reorder(f"weight_ih_{end}") for end in ends]
    R = [reorder(f"weight_hh_{end}") for end in ends]
    B = [torch.cat([reorder(f"bias_ih_{end}"), reorder(f"bias_hh_{end}")]) for end in ends]
    return tuple(torch.stack(tensors).numpy() for tensors in (W, R, B))


def _value(name: str):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["a", "b", None])
