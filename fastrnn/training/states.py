"""Exact gradients of losses with respect to every hidden state, through the modules' public face.

Inside ``recorded`` each recurrent module runs one step and one layer at a time, so that every h_t
and c_t is a tensor of its own in the graph: what autograd returns for it is the whole dL/dh_t, the
part that comes down from the output and the part that comes back from later steps. For c_t
autograd sees only what later steps say; what comes through h_t = o_t tanh(c_t) is added by that
formula, with o_t recomputed from the weights; a cell that does not follow it (checked against its
h_t) has no c.
The function computed is the same; only its cost is higher, which is why callers sample.
"""

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from fastrnn.training.tbptt import State, map_state


@dataclass
class Track:
    """The states of one direction of one layer, in the order they were computed."""

    reverse: bool
    h: list[Tensor] = field(default_factory=list)  # each [1, n_t, P]
    c: list[Tensor] = field(default_factory=list)  # each [1, n_t, H], LSTM only
    slope: list[Tensor] = field(default_factory=list)  # dh_t / dc_t before projection, like c
    w_hr: Tensor | None = None  # [P, H] of an LSTM with projection

    def gradients_of_c(self, from_h: list[Tensor], from_later: list[Tensor]) -> list[Tensor]:
        """The whole dL/dc_t from dL/dh_t and from what step t + 1 says of c_t."""
        down = from_h if self.w_hr is None else [g @ self.w_hr for g in from_h]
        return [b + a * s for a, b, s in zip(down, from_later, self.slope, strict=True)]


Tracks = dict[str, Track]  # by name, such as "layer 1"


def direction_of(rnn: nn.RNNBase, layer: int, reverse: bool) -> nn.RNNBase:
    """One direction of one layer as a module of its own that shares the parameters."""
    one = copy.copy(rnn)
    suffix = f"_l{layer}{'_reverse' if reverse else ''}"
    one._parameters = {
        f"{name.removesuffix(suffix)}_l0": p for name, p in rnn._parameters.items() if name.endswith(suffix)
    }
    one._flat_weights_names = list(one._parameters)
    one._flat_weights = list(one._parameters.values())
    one._flat_weight_refs = [weakref.ref(p) for p in one._flat_weights]
    one._all_weights = [one._flat_weights_names]
    one.num_layers, one.bidirectional, one.batch_first, one.dropout = 1, False, False, 0.0
    one.input_size = one.weight_ih_l0.shape[1]
    one.__dict__.pop("forward", None)
    return one


def run_direction(
    one: nn.RNNBase, x: Tensor, rows: list[int], state: State, track: Track
) -> tuple[Tensor, State]:
    """y [T, B, P] and the final state of a single-direction module, one step at a time.

    Args:
        x: [T, B, I], rows sorted by length.
        rows: of each step, the number of rows that are still (or already) running.
        state: h [1, B, P] and, of an LSTM, c [1, B, H], before the first step.
    """
    lstm = isinstance(state, tuple)
    outputs: list[Any] = [None] * len(rows)
    for t in reversed(range(len(rows))) if track.reverse else range(len(rows)):
        n = rows[t]
        _, new = one(x[t : t + 1, :n], map_state(lambda s, n=n: s[:, :n], state))
        h = new[0] if lstm else new
        track.h.append(h)
        if lstm:
            track.c.append(new[1])
            track.slope.append(slope(one, x[t, :n], state[0][:, :n], new))
        outputs[t] = F.pad(h[0], (0, 0, 0, x.shape[1] - n))
        pairs = zip(new, state, strict=True) if lstm else [(new, state)]
        whole = [torch.cat([a, b[:, n:]], dim=1) if n < b.shape[1] else a for a, b in pairs]
        state = tuple(whole) if lstm else whole[0]
    return torch.stack(outputs), state


@torch.no_grad()
def slope(one: nn.RNNBase, x: Tensor, h_prev: Tensor, new: tuple[Tensor, Tensor]) -> Tensor:
    """dh_t / dc_t = o (1 - tanh(c)^2) of an LSTM [1, n, H]; NaN if the cell is another one."""
    pre = F.linear(x, one.weight_ih_l0) + F.linear(h_prev, one.weight_hh_l0)
    if one.bias:
        pre = pre + one.bias_ih_l0 + one.bias_hh_l0
    o, tanh_c = pre.chunk(4, dim=-1)[3].sigmoid(), new[1].tanh()
    h = F.linear(o * tanh_c, one.weight_hr_l0) if one.proj_size else o * tanh_c
    same = torch.allclose(h, new[0], atol=1e-3)
    return o * (1 - tanh_c.square()) if same else torch.full_like(o, torch.nan)


def stepwise(rnn: nn.RNNBase, tracks: Tracks, name: str, x: Any, hx: State = None) -> tuple[Any, State]:
    """``rnn(x, hx)`` computed step by step; every state is added to ``tracks``."""
    packed = x if isinstance(x, PackedSequence) else None
    if packed is not None:
        rows = packed.batch_sizes.tolist()
        sorted_only = PackedSequence(packed.data, packed.batch_sizes)
        x, _ = pad_packed_sequence(sorted_only)
    else:
        x = x.transpose(0, 1) if rnn.batch_first else x
        rows = [x.shape[1]] * x.shape[0]
    directions = 2 if rnn.bidirectional else 1
    hx = initial_state(rnn, x, directions) if hx is None else hx
    if packed is not None and packed.sorted_indices is not None:
        hx = map_state(lambda s: s[:, packed.sorted_indices], hx)
    finals = []
    for layer in range(rnn.num_layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            key = f"{name}layer {layer + 1}{' reverse' if direction else ''}"
            one = direction_of(rnn, layer, bool(direction))
            w_hr = one.weight_hr_l0.detach() if rnn.proj_size else None
            track = tracks.setdefault(key, Track(bool(direction), w_hr=w_hr))
            start = map_state(lambda s, i=index: s[i : i + 1], hx)
            y, final = run_direction(one, x, rows, start, track)
            outputs.append(y)
            finals.append(final)
        x = torch.cat(outputs, dim=-1)
        if layer < rnn.num_layers - 1:
            x = F.dropout(x, rnn.dropout, rnn.training)
    if isinstance(hx, tuple):
        state: State = tuple(torch.cat(parts) for parts in zip(*finals, strict=True))
    else:
        state = torch.cat(finals)
    if packed is None:
        return (x.transpose(0, 1) if rnn.batch_first else x), state
    if packed.unsorted_indices is not None:
        state = map_state(lambda s: s[:, packed.unsorted_indices], state)
    data = torch.cat([x[t, :n] for t, n in enumerate(rows)])
    return packed._replace(data=data), state


def initial_state(rnn: nn.RNNBase, x: Tensor, directions: int) -> State:
    layers, batch = rnn.num_layers * directions, x.shape[1]
    h = x.new_zeros(layers, batch, rnn.proj_size or rnn.hidden_size)
    return (h, x.new_zeros(layers, batch, rnn.hidden_size)) if rnn.mode == "LSTM" else h


@contextmanager
def recorded(model: nn.Module) -> Iterator[Tracks]:
    """Within the block, every recurrent module of ``model`` runs step by step and is recorded."""
    tracks: Tracks = {}
    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.RNNBase)]
    for name, rnn in modules:
        prefix = f"{name} " if len(modules) > 1 else ""

        def forward(x: Any, hx: State = None, rnn: Any = rnn, prefix: str = prefix) -> Any:
            return stepwise(rnn, tracks, prefix, x, hx)

        rnn.forward = forward  # type: ignore[method-assign]
    try:
        yield tracks
    finally:
        for _, rnn in modules:
            del rnn.forward


def by_steps_back(gradients: list[Tensor], reverse: bool) -> Tensor:
    """Norms [K] of state gradients by how many steps before the row's last one they stand.

    Args:
        gradients: [1, n_t, P] in the order of computation; rows are sorted by length, so that a
            forward direction loses rows as it goes and a reverse one gains them.
    """
    steps, most = len(gradients), max(g.shape[1] for g in gradients)
    squares = torch.zeros(steps, most)
    for t, g in enumerate(gradients):
        squares[t, : g.shape[1]] = g[0].detach().float().square().sum(-1).cpu()
    counts = torch.tensor([g.shape[1] for g in gradients])
    lengths = (counts[:, None] > torch.arange(most)).sum(0)  # [B]
    last = torch.full_like(lengths, steps - 1) if reverse else lengths - 1
    back = last[None, :] - torch.arange(steps)[:, None]  # [T, B]
    valid = back >= 0
    return torch.zeros(steps).index_add(0, back[valid], squares[valid]).sqrt()


def state_gradients(
    model: nn.Module, losses: Callable[[], dict[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    """Norm of dL/dh_t (and dL/dc_t) for each step back from the end, of each loss and layer.

    Args:
        model: holds the recurrent modules (torch.nn's or fastrnn's).
        losses: runs the model and returns scalars. Its side effects are the caller's to avoid;
            random generators are restored afterwards, and no ``.grad`` is touched.

    Returns:
        loss name -> "h layer 1" (or "c layer 1", ...) -> norms [K], entry k being k steps back.
    """
    devices = list({p.device for p in model.parameters() if p.is_cuda})
    found: dict[str, dict[str, Tensor]] = {}
    with torch.random.fork_rng(devices), torch.enable_grad(), recorded(model) as tracks:
        for name, loss in losses().items():
            found[name] = {}
            for key, track in tracks.items():
                flat = torch.autograd.grad(
                    loss,
                    [*track.h, *track.c],
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                of_h, of_c = list(flat[: len(track.h)]), list(flat[len(track.h) :])
                found[name][f"h {key}"] = by_steps_back(of_h, track.reverse)
                if of_c and not any(s.isnan().any() for s in track.slope):
                    whole = track.gradients_of_c(of_h, of_c)
                    found[name][f"c {key}"] = by_steps_back(whole, track.reverse)
    return found
