"""OpenVINO as a peer: the ONNX model of ``onnx_peer`` on its CPU plugin, in float32, for inference.

It needs the optional package ``openvino`` beside those of ``onnx_peer``.
"""

from collections.abc import Callable

import numpy as np
import openvino
from torch import Tensor

from fastrnn.bench.onnx_peer import build_model, supports
from fastrnn.bench.workload import Workload

__all__ = ["make_call", "supports"]


def make_call(workload: Workload, threads: int) -> Callable[[], list[np.ndarray]]:
    """A call of OpenVINO that returns y [T, B, D*H] and the final states [L*D, B, H]."""
    assert isinstance(workload.x, Tensor)
    feeds = {"x": workload.x, **{f"s{k}": state for k, state in enumerate(workload.states)}}
    core = openvino.Core()
    model = core.read_model(build_model(workload.module))
    model.reshape({name: list(t.shape) for name, t in feeds.items()})  # faster than open sizes
    # Its default is bfloat16 where the processor has it.
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    arrays = {name: t.detach().numpy() for name, t in feeds.items()}
    return lambda: list(request.infer(arrays, share_inputs=True).values())
