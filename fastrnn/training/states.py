"""Norms of a loss's gradients by every hidden state, as fastrnn's backward kernels hand them out."""

import time
from collections import defaultdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastrnn
from fastrnn.functional import StateGradients, no_kernel_reason


class StateGradientNorms:
    """While open, listens to the backward passes through the fastrnn layers inside a model::

        with StateGradientNorms(model) as norms:
            loss_of(model).backward()
            profile = norms.take()["h layer 1"]  # [K], entry k being k steps back from the end

    Back-propagation is as usual and costs next to nothing more. Each row of a batch is counted back
    from its own last step; a reverse direction ends at its first. Several calls of a module (the
    parts of a chunk, outputs fed back) are taken to follow one another in time. Layers that have no
    kernels here, such as torch.nn's, are not heard.
    """

    def __init__(self, model: nn.Module) -> None:
        self.seconds = 0.0  # spent on listening
        self.parameters: list[nn.Parameter] = []  # of the layers that are heard
        self._heard: dict[str, list[Tensor]] = defaultdict(list)  # squares [T] of each call, the last first
        modules = [
            (name, m)
            for name, m in model.named_modules()
            if isinstance(m, (fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN))
            and no_kernel_reason(m.weight_hh_l0) is None  # type: ignore[arg-type]
        ]
        self._handles = []
        for name, module in modules:
            prefix = f"{name} " if len(modules) > 1 else ""
            self._handles.append(module.register_state_gradient_hook(partial(self._hear, prefix)))
            self.parameters += [p for p in module.parameters() if p.requires_grad]

    def _hear(self, prefix: str, gradients: StateGradients) -> None:
        start = time.perf_counter()
        rows = gradients.rows
        t, b = rows.places()
        for d in range(len(gradients.dh)):
            back = (t if d else rows.ends()[b] - 1 - t).clamp_min(0)  # rows beyond an end are zero
            for kind, values in (("h", gradients.dh), ("c", gradients.dc)):
                if values is not None:
                    squares = values[d].float().square().sum(-1)
                    profile = squares.new_zeros(rows.T).index_add(
                        0, back.to(squares.device, non_blocking=True), squares
                    )
                    self._heard[
                        f"{kind} {prefix}layer {gradients.layer + 1}{' reverse' if d else ''}"
                    ].append(profile)
        self.seconds += time.perf_counter() - start

    def take(self) -> dict[str, Tensor]:
        """Norms [K] of what was heard since the last time, by "h layer 1", "c layer 1" and so on."""
        keys = sorted(self._heard, key=lambda key: (key[1:], key[0] == "c"))
        found = {key: torch.cat(self._heard[key]).sqrt().cpu() for key in keys}
        self._heard.clear()
        return found

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> "StateGradientNorms":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()
