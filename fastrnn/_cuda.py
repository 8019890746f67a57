"""The CUDA kernels: whether they are here, why not, and which path a scan takes on a device."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

OLDEST_CAPABILITY = (8, 0)
_NUMBERS = {
    torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32", torch.float64: "f64",
}  # fmt: skip


@cache
def missing() -> str | None:
    """Why the CUDA operators are not registered, or None if they are."""
    if torch.version.cuda is None:
        return "this torch is not a CUDA build"
    try:
        from . import _C_cuda  # type: ignore[attr-defined]  # noqa: F401  (registers them)
    except ImportError as error:
        return f"fastrnn's CUDA kernels do not load: {error}"
    return None


@cache
def device_reason(index: int) -> str | None:
    """Why no kernel runs on this device, or None if they do."""
    capability = torch.cuda.get_device_capability(index)
    if capability >= OLDEST_CAPABILITY:
        return None
    has = ".".join(map(str, capability))
    return f"the CUDA kernels need compute capability 8.0, and device {index} has {has}"


def _reason(index: int) -> str | None:
    return missing() or device_reason(index)


# What torch.compiler.assume_constant_result does, without loading the compiler at every import: it cannot
# trace what asks a device for its capability.
_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def no_kernel_reason(weight: Tensor) -> str | None:
    """Why a recurrence with this CUDA weight has no kernel, or None if there is one."""
    if reason := _reason(weight.get_device()):
        return reason
    return None if weight.dtype in _NUMBERS else f"there are no CUDA kernels for {weight.dtype}"


def _tf32_is_allowed() -> bool:
    return torch._C._get_fp32_precision_getter("cuda", "rnn") == "tf32"


def plan(
    weight: Tensor, cell: Any, forward: bool, T: int, B: int, H: int, D: int, projected: bool,
    options: Sequence[str] = (),
) -> str:  # fmt: skip
    """The path of one scan on the device of the weight, in words. options: those that act between its steps,
    by name."""
    if not cell.dense:
        return "one kernel for all steps: no unit waits for another"
    if options:
        return f"a matrix product and a kernel each step: {' and '.join(options)} act between the steps"
    if cell.row_numbers:
        return "a matrix product and a kernel each step: the cell has sums over its units"
    numbers = _NUMBERS[weight.dtype]
    if numbers == "f32" and _tf32_is_allowed():
        numbers = "tf32"
    device: Any = torch.cuda.get_device_properties(weight.device)
    return torch.ops.fastrnn.cuda_plan(
        forward, numbers, cell.gates, T, B, H, D, projected,
        device.multi_processor_count, device.shared_memory_per_block_optin,
    )  # fmt: skip
