"""A case made runnable: module, input and states of one library, and the calls that are timed.

Training is forward and backward of y through the public module, with gradients for the input, the
initial states and every parameter; inference is the same call under ``torch.no_grad``.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from fastrnn.bench.cases import TRAIN, Case
from fastrnn.bench.loops import LOOPS

# Limits of ||a - b|| / ||b||, wide enough for gradients that are sums over thousands of rows.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 0.1}

# torch's warning at each projected LSTM; the benchmark measures this path on purpose and hides it.
NO_PROJECTION = "LSTM with projections is not supported with oneDNN"


class Disagreement(AssertionError):
    """A library's results are not those of torch.nn in float64: its time means nothing."""


class Workload:
    """``case`` on ``library``, torch.nn or fastrnn; every library gets the same numbers."""

    def __init__(
        self,
        case: Case,
        library: ModuleType,
        mode: str,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
    ):
        self.case, self.mode = case, mode
        dtype = dtype or case.dtype
        D = 2 if case.bidirectional else 1
        R = case.proj_size or case.H
        random = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=case.dtype).to(device, dtype)

        torch.manual_seed(0)
        weights = make_module(case.plain, nn).state_dict()
        self.module = make_module(case, library).to(device, dtype)
        self.module.load_state_dict(weights, strict=not case.options)  # an option may have its own
        self.module.train(mode == TRAIN)
        x = draw(case.T, case.B, case.I)  # [T, B, I]
        rows = (case.B,) if case.is_loop else (D * case.layers, case.B)
        widths = (R, case.H) if case.cell.startswith("LSTM") else (R,)
        self.states = tuple(draw(*rows, width) for width in widths)  # h0 and, for an LSTM, c0
        self.grad_y = draw(case.T, case.B, D * R)  # [T, B, D*R], the gradient that reaches y
        self.x: Tensor | PackedSequence = x
        if case.fill < 1:
            self.x = pack_padded_sequence(x, case.lengths())
            self.grad_y = pack_padded_sequence(self.grad_y, case.lengths()).data
            x = self.x.data
        self.keywords = _of_call(case, draw, device)
        self.leaves = [x, *self.states, *self.module.parameters()]
        for leaf in self.leaves:
            leaf.requires_grad_(mode == TRAIN)

    def __call__(self) -> list[Tensor]:
        """One timed call: [y, final states..., gradients of x, initial states, parameters...]."""
        if self.mode != TRAIN:
            with torch.no_grad():
                return self.forward()
        results = self.forward()
        return [*results, *torch.autograd.grad(results[0], self.leaves, self.grad_y)]

    def forward(self) -> list[Tensor]:
        if self.case.is_loop:
            return self.forward_loop()
        states = self.states if len(self.states) == 2 else self.states[0]
        y, final = self.module(self.x, states, **self.keywords)
        y = y.data if isinstance(y, PackedSequence) else y
        return [y, *final] if isinstance(final, tuple) else [y, final]

    def forward_loop(self) -> list[Tensor]:
        assert isinstance(self.x, Tensor)
        state = self.states if len(self.states) == 2 else self.states[0]
        steps = []
        for x in self.x.unbind():
            state = self.module(x, state)
            steps.append(state[0] if isinstance(state, tuple) else state)
        return [torch.stack(steps), *(state if isinstance(state, tuple) else (state,))]


def _of_call(case: Case, draw: Callable[..., Tensor], device: str) -> dict:
    """What a call with resets takes besides."""
    options = dict(case.options)
    if "reset" not in options:
        return {}
    random = torch.Generator().manual_seed(0)
    keywords: dict = {"reset": (torch.rand(case.T, case.B, generator=random) < options["reset"]).to(device)}
    if "reset_to" in options:
        h = draw(1, case.B, case.H)
        keywords["reset_to"] = (h, draw(1, case.B, case.H)) if case.cell == "LSTM" else h
    return keywords


def make_module(case: Case, library: ModuleType) -> nn.Module:
    make = LOOPS[case.cell] if library is nn and case.cell in LOOPS else getattr(library, case.cell)
    if case.is_loop:
        return make(case.I, case.H, dtype=case.dtype)
    projection = {"proj_size": case.proj_size} if case.proj_size else {}
    options = {name: value for name, value in case.options if not name.startswith("reset")}
    return make(
        case.I,
        case.H,
        case.layers,
        dropout=case.dropout,
        bidirectional=case.bidirectional,
        dtype=case.dtype,
        **projection,
        **options,
    )


def check(workload: Workload, reference: list[Tensor], limit: float = 0) -> None:
    """Raise Disagreement unless a call's results are those of the float64 reference, to the limit or the
    tolerance of their dtype."""
    training = workload.module.training
    workload.module.eval()  # no dropout: two libraries share no random stream
    results = workload()
    workload.module.train(training)
    agree(workload.case.name, results, reference, limit)


def reference_results(case: Case, mode: str) -> list[Tensor]:
    """torch.nn's results in float64, without dropout; with options, which it has not, fastrnn's."""
    workload = Workload(case, fastrnn if case.options else nn, mode, torch.float64)
    workload.module.eval()
    return workload()


def agree(name: str, results: list[Tensor], reference: list[Tensor], least: float = 0) -> None:
    for k, (result, expected) in enumerate(zip(results, reference, strict=True)):
        limit = max(least, TOLERANCE[result.dtype])
        error = float(
            (result.double() - expected).detach().norm() / expected.detach().norm().clamp_min(1e-30)
        )
        if result.shape != expected.shape or not error <= limit:
            raise Disagreement(f"{name}: result {k} is off by {error:.1e}, more than {limit:.0e}")
