"""``fastrnn.explain``: which kernel each recurrent layer of a module takes, and why."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import _cuda, _options, _prepack, functional, minimal, modules, step_options
from .reference import CELLS


@dataclass(frozen=True)
class Explanation:
    """The kernels of one layer. Where fastrnn has none, ``operator`` is None and the other fields say why."""

    module: str
    layer: int
    operator: str | None
    forward: str
    backward: str
    options: str = ""  # that torch.nn's modules have not, as in the module's repr

    def __str__(self) -> str:
        name = f"{self.module or '(model)'} layer {self.layer}" + (self.options and f" ({self.options})")
        if self.operator is None:
            return f"{name}: no kernel of fastrnn's, because {self.forward}"
        return f"{name}: {self.operator}\n  forward   {self.forward}\n  backward  {self.backward}"


class Explanations(list[Explanation]):
    """One Explanation a layer; prints as text."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no fastrnn module inside"

    __repr__ = __str__


def explain(
    module: nn.Module, input: Tensor | PackedSequence, hx: Any = None, *others: Any, **keywords: Any
) -> Explanations:
    """Which kernel each fastrnn layer inside ``module`` takes for ``input``, forward and backward, and why.

    Runs ``module(input)`` once without gradients (``module(input, hx, *others)`` with hx, and with the
    keywords, such as ``lengths``) to see what reaches each layer, under autocast if it is on; batch norm and
    other state is left as eval() leaves it. print() the result, or read its fields.
    """
    explanations, handles = Explanations(), []

    def record(name: str):
        def hook(layer: nn.Module, args: tuple, keywords: dict) -> None:
            given = args[0] if args else keywords["input"]
            reset_to = keywords.get("reset_to", args[5] if len(args) > 5 else None)
            acts = [] if reset_to is None else ["reset_to"]
            explanations.extend(_explain_module(name, layer, given, training[layer], acts))

        return hook

    for name, child in module.named_modules():
        if isinstance(child, (modules._Recurrent, modules._RecurrentCell, minimal._LinearRecurrent)):
            handles.append(child.register_forward_pre_hook(record(name), with_kwargs=True))
    training = {child: child.training for child in module.modules()}
    try:
        module.eval()
        with torch.no_grad():
            module(*((input,) if hx is None and not others else (input, hx, *others)), **keywords)
    finally:
        for handle in handles:
            handle.remove()
        for child, was in training.items():
            child.training = was
    return explanations


def _explain_module(
    name: str,
    module: nn.Module,
    input: Tensor | PackedSequence,
    training: bool = True,
    acts: Sequence[str] = (),  # arguments of the call that act between its steps
) -> Explanations:
    if isinstance(module, minimal._LinearRecurrent):
        return _explain_linear(name, module)
    assert isinstance(module, (modules._Recurrent, modules._RecurrentCell))
    cell, options = module._cell_name(), _options.text(_options.beyond_torch(module._fused_options))
    if isinstance(module, modules._Recurrent):
        weight = module.weight_hh_l0
        L, D, H, P = _stack_sizes(module)
        T, B = _sequence_sizes(module.batch_first, input)
    else:
        assert isinstance(input, Tensor)
        weight, L, D, H, P = module.weight_hh, 1, 1, module.hidden_size, module.hidden_size
        T, B = 1, input.shape[0] if input.dim() == 2 else 1
    assert isinstance(weight, Tensor)
    (weight,) = functional.lowered((weight,))
    reason = functional.no_kernel_reason(weight) if H > 0 else "there are no units (H = 0) to compute"
    if reason is not None:
        return Explanations(Explanation(name, layer, None, reason, reason, options) for layer in range(L))
    numbers, layers = CELLS[cell], [weights for _, weights in module._scan_layers()]
    if weight.is_cuda:

        def plan(forward: bool) -> str:
            acting = step_options.acting(module._fused_options, training, gradients=not forward)  # type: ignore[union-attr]
            return _cuda.plan(weight, numbers, forward, T, B, H, D, H != P, [*acting, *acts])

        forwards, backward = [plan(True)] * L, plan(False)
    else:
        N = len(input.data) if isinstance(input, PackedSequence) else T * B
        products = functional.dtype_of_products(weight, N, layers[0])
        size = (products or weight.dtype).itemsize
        note = functional.note_of_products(products)
        forwards = [
            _shared_out(T, B, H, P, numbers.gates, D, 1 if _prepack.in_int8(weights) else size) + note
            for weights in layers
        ]
        backward = _shared_out(T, B, P, H, numbers.gates, D, size) + note
    return Explanations(
        Explanation(name, layer, f"fastrnn::{cell}", forward + _prepack.note(weights), backward, options)
        for layer, (forward, weights) in enumerate(zip(forwards, layers, strict=True))
    )


def _explain_linear(name: str, module: minimal._LinearRecurrent) -> Explanations:
    (weight,) = functional.lowered((next(module.parameters()),))
    operator: str | None = "fastrnn::linear_scan"
    if reason := functional.no_linear_scan_reason(weight):
        operator, how = None, reason
    elif weight.is_cuda:
        how = "chunks of steps side by side where rows and units do not fill the device"
    else:
        how = f"rows, then units, over at most {torch.get_num_threads()} threads"
        if weight.dtype in functional.SUMMED_IN_FLOAT32:
            how += ", in float32"
    return Explanations(Explanation(name, layer, operator, how, how) for layer in range(module.num_layers))


def _stack_sizes(module: nn.RNNBase) -> tuple[int, int, int, int]:
    D = 2 if module.bidirectional else 1
    return module.num_layers, D, module.hidden_size, module.proj_size or module.hidden_size


def _sequence_sizes(batch_first: bool, input: Tensor | PackedSequence) -> tuple[int, int]:
    if isinstance(input, PackedSequence):
        return input.batch_sizes.shape[0], int(input.batch_sizes[0])
    if input.dim() == 2:
        return input.shape[0], 1
    T, B = input.shape[:2] if not batch_first else input.shape[1::-1]
    return T, B


def _shared_out(T: int, B: int, units: int, K: int, gates: int, D: int, weight_bytes: int) -> str:
    sum_bytes = max(weight_bytes, 4)
    teams, parts = torch.ops.fastrnn.cpu_plan(T, max(B, 1), units, K, gates, D, sum_bytes, weight_bytes)
    work = f"{torch.ops.fastrnn.cpu_isa()} kernels, "
    if D * teams * parts == 1:
        return work + "one thread: too little work to share, or no other thread"
    shares = [f"{D} directions"] * (D > 1) + [f"{teams} teams of rows"] * (teams > 1)
    shares += [f"{parts} parts of the units, which meet once a step"] * (parts > 1)
    return work + f"{torch.get_num_threads()} threads: " + ", ".join(shares)
