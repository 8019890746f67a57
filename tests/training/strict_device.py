"""A device that is not there, in CUDA's place: its tensors say ``strict:0``, their numbers lie on the CPU.

It is as strict as a real one: an operator that mixes its tensors with the CPU's raises. Each wait of the host
for the device is recorded: a number that is read, a size that depends on numbers, a copy that blocks.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from torch import Tensor
from torch._decomp import decompositions
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as setup_backend

setup_backend(rename="strict")
DEVICE = torch.device("strict", 0)
WAITS = {
    "aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select", "aten::_unique2",
    "aten::unique_dim", "aten::unique_consecutive", "aten::repeat_interleave.Tensor", "aten::bincount",
}  # fmt: skip
TAKE_BOTH = (
    "aten::index",
    "aten::_index_put",
    "aten::_pack_padded",
    "fastrnn::",
)  # indices and lengths may lie on the CPU
waits: list[str] = []  # operator and line of each wait since the list was last cleared


class DeviceTensor(Tensor):
    """A tensor of the device; ``held`` has its numbers."""

    held: Tensor
    is_cuda = True  # for fastrnn, which then goes the way of CUDA
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "DeviceTensor":
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        made.held = held
        return made

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"DeviceTensor({list(self.shape)}, {self.dtype})"

    def __format__(self, specification: str) -> str:
        return format(self.item() if self.dim() == 0 else self.held, specification)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)  # loaded on the CPU, as Lightning loads

    def tolist(self) -> Any:
        record("tolist")
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_device(func, args, dict(kwargs or {}))


class ToDevice(TorchDispatchMode):
    """Sends to the device whatever is made there, or copied to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        asked = kwargs.get("device")
        if asked is not None and torch.device(asked).type == "strict":
            return on_device(func, args, kwargs)
        if any(isinstance(t, DeviceTensor) for t in tree_leaves((args, kwargs))):
            return on_device(func, args, kwargs)
        return func(*args, **kwargs)


def on_device(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, to = func.name(), kwargs.get("device")
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    here = [t for t in tensors if isinstance(t, DeviceTensor)]
    leaves = to is not None and torch.device(to).type != "strict"
    if name in ("aten::_to_copy", "aten::copy_"):
        blocks = not (kwargs.pop("non_blocking", False) or (name == "aten::copy_" and True in args[2:]))
        arrives = len(here) < len(tensors) or (not here and not leaves)
        read = name == "aten::copy_" and here and not isinstance(args[0], DeviceTensor)
        if leaves or read or (arrives and blocks):
            record(name)
    elif here and not name.startswith(TAKE_BOTH):
        single = not name.startswith("aten::_fused")  # elsewhere a single number may lie on the CPU
        others = [t for t in tensors if not (isinstance(t, DeviceTensor) or (single and t.dim() == 0))]
        if others:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, strict:0 and "
                f"{others[0].device}: {name} of {[list(t.shape) for t in tensors]}"
            )
    by_mask = name.startswith("aten::index.") and any(
        t is not None and t.dtype == torch.bool for t in args[1]
    )
    if name in WAITS or by_mask:
        record(name)
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    plain_args, plain_kwargs = tree_map_only(DeviceTensor, lambda t: t.held, (args, kwargs))
    found = func(*plain_args, **plain_kwargs)
    if leaves:
        return found
    same = {id(t.held): t for t in here}  # what is written in place stays the object that it is
    if name == "aten::copy_":
        return args[0]
    if name == "aten::_pack_padded_sequence":
        return DeviceTensor(found[0]), found[1]  # batch_sizes are the CPU's
    return tree_map_only(Tensor, lambda t: same.get(id(t)) if id(t) in same else DeviceTensor(t), found)


def made_on_the_host(make: Any, data: Any, device: Any = None, **given: Any) -> Tensor:
    return make(data, **given).to(device=device)


def record(name: str) -> None:
    """With the innermost line of fastrnn's or of Lightning's."""
    frame: Any = sys._getframe()
    while frame and not any(part in frame.f_code.co_filename for part in ("/fastrnn/", "/lightning/")):
        frame = frame.f_back
    where = f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}" if frame else "?"
    waits.append(f"{name} {where}")


# Inference mode makes tensors of which torch allows a subclass no copies.
STRICT = ["--trainer.accelerator=strict", "--trainer.strategy=strict", "--trainer.inference_mode=false"]


class StrictAccelerator(Accelerator):
    """The device as Lightning sees it."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return int(devices) if devices != "auto" else 1

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        return [DEVICE] * devices

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "strict"

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}


@contextmanager
def strict_device(patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The device is there; the list of waits."""
    if "strict" not in AcceleratorRegistry:
        AcceleratorRegistry.register("strict", StrictAccelerator)
    if "strict" not in StrategyRegistry:
        StrategyRegistry.register("strict", SingleDeviceStrategy, device=DEVICE)
    patch.setattr("fastrnn._cuda._reason", lambda index: None)
    patch.setattr(torch.accelerator, "synchronize", lambda device=None: record("synchronize"))
    generator = torch.Generator
    patch.setattr(torch, "Generator", lambda device=None: generator())
    # These make tensors past the mode; on CUDA they make them on the host, copy them, and wait.
    for name in ("tensor", "as_tensor"):
        patch.setattr(torch, name, partial(made_on_the_host, getattr(torch, name)))
    waits.clear()
    with torch.library._scoped_library("aten", "IMPL") as library, ToDevice():
        # torch.nn's layers as single operators, in place of the kernels that CUDA has for their steps
        for name in ("lstm", "gru"):
            for form, made in (("input", "impl"), ("data", "data_impl" if name == "lstm" else "impl_data")):
                made_of = getattr(decompositions, f"{name}_{made}")
                library.impl(f"{name}.{form}", made_of, "AutogradPrivateUse1")
        with torch.autograd.set_multithreading_enabled(False):  # no thread for this device
            yield waits
