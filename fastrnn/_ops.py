"""The operators as differentiable functions: one autograd Function a scan, from the table of cells.

The operators are the scan over time, its way back, and the products that give the gradients of weights and
input.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _C, _cuda, _prepack, reference  # noqa: F401  (_C registers the operators)
from .reference import CELLS, Layout

Maybe = Tensor | None
Tensors = list[Tensor] | tuple[Tensor, ...]


class Sequence(NamedTuple):
    """How the rows [N, *] are laid out, and which of them take part."""

    batch_first: bool
    batch_sizes: Maybe = None  # packed: int64 [T] on the CPU
    lengths: Maybe = None  # dense: int64 [B] on the CPU
    reset: Maybe = None  # bool [N]

    def layout(self, N: int, B: int) -> Layout:
        return Layout(N, B, *self)


# What a scan writes beside y and the last states (csrc/common/schemas.h).
SAVE_NOTHING, SAVE_FOR_BACKWARD, SAVE_EVERY_C = range(3)

# ---- Fake kernels: the shapes of the results ---------------------------------------------------------


def _register_fakes(name: str) -> None:
    cell = CELLS[name]

    def scanned(x, h0, H, save):
        D, B, P = h0.shape
        N = x.shape[0]
        return (
            h0.new_empty(N, D * P),
            h0.new_empty(D, B, P),
            h0.new_empty(D, B, H) if cell.has_c else h0.new_empty(0),
            h0.new_empty(D, N, cell.saved * H) if save == SAVE_FOR_BACKWARD else h0.new_empty(0),
            h0.new_empty(D, N, H) if save and cell.has_c else h0.new_empty(0),
        )

    @torch.library.register_fake(f"fastrnn::{name}")
    def _(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, u, batch_sizes, lengths, reset, batch_first, save):
        return scanned(x, h0, w_hh[0].shape[0] // cell.gates, save)

    @torch.library.register_fake(f"fastrnn::{name}_packed")
    def _(x, h0, c0, packed, batch_sizes, lengths, reset, batch_first, save):
        return scanned(x, h0, h0.shape[2] if c0 is None else c0.shape[2], save)

    @torch.library.register_fake(f"fastrnn::{name}_pack")
    def _(w_ih, w_hh, b_ih, b_hh, w_hr, u, bfloat16):  # how long depends on the processor
        return w_hh[0].new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)

    def scanned_back(
        in_place, dy, dh_n, dc_n, dsaved_c, saved, saved_c, y, h0, c0, w_hh, w_hr, u, batch_sizes,
        lengths, reset, batch_first, keep,
    ):  # fmt: skip
        D, B, P = h0.shape
        N, H = y.shape[0], w_hh[0].shape[0] // cell.gates
        return (
            h0.new_empty(0) if in_place else h0.new_empty(D, N, cell.gradients * H),
            h0.new_empty(D, B, P),
            h0.new_empty(D, B, H) if cell.has_c else h0.new_empty(0),
            h0.new_empty(D, N, P) if w_hr or keep else h0.new_empty(0),
            h0.new_empty(D, N, H) if cell.has_c and keep else h0.new_empty(0),
            h0.new_empty(D, cell.vectors, H) if cell.vectors else h0.new_empty(0),
        )

    torch.library.register_fake(f"fastrnn::{name}_backward", partial(scanned_back, False))
    if cell.in_place:
        torch.library.register_fake(f"fastrnn::{name}_backward_in_place", partial(scanned_back, True))

    @torch.library.register_fake(f"fastrnn::{name}_products")
    def _(dgates, x, y, h0, w_ih, batch_sizes, lengths, reset, batch_first, inputs, weights):
        D, _, P = h0.shape
        GH, I = w_ih[0].shape
        shapes = [(D, GH, I), (D, GH, P), (D, GH), (D, GH)]
        return (
            torch.empty_like(x, memory_format=torch.contiguous_format) if inputs else h0.new_empty(0),
            *(h0.new_empty(shape if weights else 0) for shape in shapes),
        )


def input_gradients(cell: reference.Cell, dgates: Tensor) -> Tensor:
    """The part of dgates [N, E*H] that belongs to the input's gates [N, G*H]: its last G blocks."""
    H = dgates.shape[-1] // cell.gradients
    return dgates[..., (cell.gradients - cell.gates) * H :]


def recurrent_gradients(cell: reference.Cell, dgates: Tensor) -> Tensor:
    """The part of dgates [N, E*H] that belongs to the recurrent gates, in the order of W_hh [G*H, P]."""
    H = dgates.shape[-1] // cell.gradients
    first = dgates[..., : cell.gates * H]
    # Where x and the recurrent product have different gradients (GRU's last gate), the recurrent one stands
    # first in dgates; here it goes back to the end.
    return first if cell.gradients == cell.gates else first.roll(-H, -1)


def products_of_torch(
    cell, dgates, x, y, h0, w_ih, batch_sizes, lengths, reset, batch_first, inputs, weights
):
    """The operator ``fastrnn::<cell>_products`` on CUDA: torch's own products are the fastest there.
    Like ``composed_products``, without its copies of what is as large as the sequence."""
    D, B, P = h0.shape
    x = Sequence(batch_first, batch_sizes, lengths).layout(len(x), B).without_padding(x)
    nothing = dgates.new_empty(0)
    dgx = input_gradients(cell, dgates)
    dx = nothing
    if inputs:
        dx = dgx[0] @ w_ih[0]
        if D == 2:
            dx.addmm_(dgx[1], w_ih[1])
    if not weights:
        return dx, nothing, nothing, nothing, nothing
    GH, I = w_ih[0].shape
    dw_ih, dw_hh = dgates.new_empty(D, GH, I), dgates.new_empty(D, GH, P)
    for d in range(D):
        torch.mm(dgx[d].T, x, out=dw_ih[d])
        dga, h = dgates[d, :, :GH], y[:, d * P : (d + 1) * P]
        if batch_first or batch_sizes is not None or reset is not None or (d == 1 and lengths is not None):
            torch.mm(dga.T, previous_rows(h, h0[d], Sequence(batch_first, batch_sizes, lengths, reset), d),
                     out=dw_hh[d])  # fmt: skip
            continue
        # The state before a row lies B rows before it, or is the initial one.
        N = len(h)
        begin, rest, before = (
            (slice(0, B), slice(B, N), slice(0, N - B))
            if d == 0
            else (slice(N - B, N), slice(0, N - B), slice(B, N))
        )
        torch.mm(dga[begin].T, h0[d], out=dw_hh[d])
        if N > B:
            dw_hh[d].addmm_(dga[rest].T, h[before])
    sums = dgates.sum(1)
    db_ih, db_hh = input_gradients(cell, sums).clone(), sums[:, :GH]
    if cell.gradients > cell.gates:  # the gate that is kept apart stands first
        H = GH // cell.gates
        dw_hh, db_hh = dw_hh.roll(-H, 1), db_hh.roll(-H, 1)
    return dx, dw_ih, dw_hh, db_ih, db_hh


for _name in CELLS:
    _register_fakes(_name)
    torch.library.impl(f"fastrnn::{_name}_products", "CUDA")(partial(products_of_torch, CELLS[_name]))
_cuda.missing()  # or registers the scans

# Resolved once: looking an operator up by name costs some microseconds.
_FORWARD = {name: getattr(torch.ops.fastrnn, name).default for name in CELLS}
_PACKED = {name: getattr(torch.ops.fastrnn, f"{name}_packed").default for name in CELLS}
_BACKWARD = {name: getattr(torch.ops.fastrnn, f"{name}_backward").default for name in CELLS}
_IN_PLACE = {
    name: getattr(torch.ops.fastrnn, f"{name}_backward_in_place").default
    for name, cell in CELLS.items()
    if cell.in_place
}
_PRODUCTS = {name: getattr(torch.ops.fastrnn, f"{name}_products").default for name in CELLS}


# ---- Autograd ----------------------------------------------------------------------------------------
# Scan is a layer, and ScanGrad its gradients as a function of their own. The kernels compute both. Whatever
# is derived further (second derivatives, forward mode) follows from the formulas in reference.py alone.
#
# Functions take tensors one by one: after x, h0, c0 come w_ih, w_hh, b_ih, b_hh, w_hr, u of all directions.


class Form(NamedTuple):
    """What a scan is, besides its tensors."""

    name: str
    batch_first: bool
    bias: bool
    projected: bool

    @property
    def cell(self) -> reference.Cell:
        return CELLS[self.name]

    def split(self, weights, D: int) -> tuple:
        """w_ih, w_hh, b_ih, b_hh, w_hr, u of all directions."""
        lists, rest = [], weights
        for there in (True, True, self.bias, self.bias, self.projected, self.cell.vectors > 0):
            lists.append(rest[:D] if there else ())
            rest = rest[len(lists[-1]) :]
        return tuple(lists)


def _one_by_one_in_legacy_vmap(rule):
    """``is_grads_batched`` and the vectorised Jacobians of torch.autograd run the rule of a derivative under
    torch's older vmap, which has a dispatch key of its own and cannot map operators that take lists. So the
    rule is called for each gradient or tangent by itself."""

    @wraps(rule)
    def mapped(ctx: Any, *tensors: Maybe):
        level = _legacy_vmap_level()
        if level == 0:
            return rule(ctx, *tensors)
        batched = [i for i, t in enumerate(tensors) if t is not None and _is_legacy_batched(t)]
        if not batched:
            return rule(ctx, *tensors)
        each = zip(*(torch._remove_batch_dim(tensors[i], level, 1, 0) for i in batched), strict=True)
        results = [rule(ctx, *_replaced(tensors, batched, one)) for one in each]
        return tuple(
            None if parts[0] is None else torch._add_batch_dim(torch.stack(parts), 0, level)
            for parts in zip(*results, strict=True)
        )

    return mapped


def _legacy_vmap_level() -> int:
    if torch.compiler.is_compiling():
        return 0
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def _is_legacy_batched(t: Tensor) -> bool:
    return torch._C._dispatch_keys(t).has(torch._C._dispatch_key_parse("Batched"))


class Scan(torch.autograd.Function):
    """(y, h_n, c_n, every c, saved) of one layer. ``saved`` belongs to the kernels and has no derivative."""

    @staticmethod
    def forward(name, batch_first, bias, projected, batch_sizes, lengths, reset, x, h0, c0, *weights):
        lists = Form(name, batch_first, bias, projected).split(weights, h0.shape[0])
        y, h_n, c_n, saved, all_c = _FORWARD[name](
            x, h0, c0, *lists, batch_sizes, lengths, reset, batch_first, SAVE_FOR_BACKWARD
        )
        return y, h_n, c_n, all_c, saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        y, _, c_n, all_c, saved = output
        ctx.form, ctx.may_write, ctx.watched, ctx.listener = inputs[:4], False, (), None
        ctx.mark_non_differentiable(*((saved,) if CELLS[inputs[0]].has_c else (c_n, all_c, saved)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, saved, all_c, *inputs[4:])

    @staticmethod
    @_one_by_one_in_legacy_vmap
    def backward(ctx: Any, dy, dh_n, dc_n, dall_c, _):  # type: ignore[override]
        form = Form(*ctx.form)
        if not form.cell.has_c:
            dc_n = dall_c = None
        gradients = (dy, dh_n, dc_n, dall_c)
        y, saved, all_c, batch_sizes, lengths, reset, x, h0, c0, *weights = ctx.saved_tensors
        rows = (batch_sizes, lengths, reset)
        wanted = tuple(ctx.needs_input_grad[7:])
        if any(version != output._version for output, version in ctx.watched):
            # An output was changed in place since. Scanning once more costs time in this rare case alone;
            # a copy of y would cost memory in every call.
            with torch.no_grad():
                y, _, _, all_c, saved = Scan.forward(*form, *rows, x, h0, c0, *weights)
        arguments = (*rows, y, saved, all_c, *gradients, x, h0, c0, *weights)
        with _without_autocast(x):
            if _is_dual() or _needs_function((*gradients, x, h0, c0, *weights)):
                found = _grad_function().apply(*form, wanted, ctx.listener, *arguments)
            else:
                in_place = ctx.may_write and _is_last_use(saved)
                found = _gradients(form, wanted, ctx.listener, in_place, *arguments)
        remaining = iter(found)
        return (None,) * 7 + tuple(next(remaining) if want else None for want in wanted)

    @staticmethod
    def vmap(info, in_dims, name, batch_first, bias, projected, *args):
        V, dims, form = info.batch_size, in_dims[4:], Form(name, batch_first, bias, projected)
        if args[0] is not None or any(d is not None for d in dims[6:]):
            return _one_by_one(_scan_function(), V, form, args, dims)
        # Shared weights: the mapped dimension is a part of the batch.
        _, lengths, reset, x, h0, c0 = (_front(a, d, V) for a, d in zip(args[:6], dims[:6], strict=True))
        B = h0.shape[2]
        y, h_n, c_n, all_c, saved = _scan_function().apply(
            *form, None, _fold_lengths(lengths), _fold_rows(reset, B, batch_first),
            _fold_rows(x, B, batch_first), _fold_state(h0), _fold_state(c0), *args[6:],
        )  # fmt: skip
        outputs = (
            _unfold_rows(y, V, B, batch_first),
            _unfold_state(h_n, V),
            _unfold_state(c_n, V),
            _unfold_saved(all_c, V, B, batch_first),
            _unfold_saved(saved, V, B, batch_first),
        )
        return outputs, tuple(0 if o.dim() > 1 else None for o in outputs)


class EagerScan(Scan):
    """Scan for ordinary calls. torch inspects the signature of a Function with a setup_context at every call,
    which took a third of a single step."""

    setup_context = torch.autograd.Function.setup_context

    @staticmethod
    def forward(ctx, name, batch_first, bias, projected, *tensors):  # type: ignore[override]
        output = y, _, c_n, all_c, saved = Scan.forward(name, batch_first, bias, projected, *tensors)
        cell = CELLS[name]
        ctx.form, ctx.listener = (name, batch_first, bias, projected), None
        ctx.set_materialize_grads(False)
        if cell.has_c:
            ctx.mark_non_differentiable(saved)
        else:
            ctx.mark_non_differentiable(c_n, all_c, saved)
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
            # torch.nn's outputs may be changed in place before backward. So aliases with version counters of
            # their own are saved, which torch does not check, and the outputs' counters are watched.
            ctx.watched = [(t.detach(), t._version) for t in ((y, all_c) if cell.has_c else (y,))]
            ctx.may_write = cell.in_place
            ctx.save_for_backward(y.data, saved, all_c.data, *tensors)
        else:  # what saved-tensor hooks get is theirs: they may keep it, or return memory that is read-only
            ctx.watched, ctx.may_write = (), False
            ctx.save_for_backward(y.clone(), saved, all_c.clone(), *tensors)
        return output


class ScanGrad(torch.autograd.Function):
    """The gradients of a scan that are ``wanted`` (a flag each for x, h0, c0 and the weights), as a function
    of the gradients of its outputs and of its inputs. y, saved and every c of the scan only spare the kernels
    to compute them again: the derivative of this function is that of the reference."""

    @staticmethod
    def forward(name, batch_first, bias, projected, wanted, listener, *tensors):
        return tuple(_gradients(Form(name, batch_first, bias, projected), wanted, listener, False, *tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.form, ctx.wanted = inputs[:4], inputs[4]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[6:9], *inputs[12:])

    @staticmethod
    @_one_by_one_in_legacy_vmap
    def backward(ctx: Any, *gradients: Maybe):  # type: ignore[override]
        rows, tensors = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        present = _present(tensors)
        with _without_autocast(tensors[4]):
            function = _reference_gradients(Form(*ctx.form), rows, ctx.wanted, tensors, present)
            outputs, pull = torch.func.vjp(function, *(tensors[i] for i in present))
            found = pull(_or_zeros(gradients, outputs))
        return (None,) * 12 + tuple(_replaced([None] * len(tensors), present, found))

    @staticmethod
    def vmap(info, in_dims, name, batch_first, bias, projected, wanted, listener, *args):
        V, dims, form = info.batch_size, in_dims[6:], Form(name, batch_first, bias, projected)
        options, rows, tensors, tensor_dims = (*form, wanted, listener), args[:3], args[6:], dims[6:]
        derived_further = _is_traced() or _needs_function(tensors)
        mapped_rows = any(d is not None for d in dims[:3])
        if (
            rows[0] is None
            and not derived_further
            and form.cell.vectors == 0
            and dims[3] is not None
            and not any(d is not None for d in dims[13:])
        ):
            found = _gradients_of_each(form, V, wanted, args, dims)
        elif derived_further and not mapped_rows:
            present = _present(tensors)
            function = _reference_gradients(form, rows, wanted, tensors, present)
            mapped = torch.func.vmap(function, in_dims=tuple(tensor_dims[i] for i in present))
            found = mapped(*(tensors[i] for i in present))
        else:
            return _one_by_one(_grad_function(), V, options, args, dims)
        return found, (0,) * len(found)


def _gradients(
    form: Form, wanted, listener, in_place, batch_sizes, lengths, reset, y, saved, all_c, dy, dh_n, dc_n,
    dall_c, x, h0, c0, *weights,
) -> list[Tensor]:  # fmt: skip
    """The wanted gradients of x, h0, c0 and the weights, from the kernels. ``in_place`` lets these write over
    saved."""
    D, keep = h0.shape[0], listener is not None
    w_ih, w_hh, _, _, w_hr, u = form.split(weights, D)
    rows = (batch_sizes, lengths, reset, form.batch_first)
    wants = form.split(wanted[3:], D)
    hidden = form.cell.hidden(saved, all_c) if any(wants[4]) else None  # before saved is written over
    operator = (_IN_PLACE if in_place else _BACKWARD)[form.name]
    dgates, dh0, dc0, dh, dc, du = operator(
        dy, dh_n, dc_n, dall_c, saved, all_c, y, h0, c0, w_hh, w_hr, u, *rows, keep
    )
    if in_place:
        dgates = saved
        torch.autograd.graph.increment_version(saved)
    if listener is not None:
        listener(dh, dc)
    products: Callable = _PRODUCTS[form.name]
    if x.is_cuda and not _is_traced():  # past the dispatcher, which takes longer than a product
        products = partial(products_of_torch, form.cell)
    any_weights = any(any(want) for want in wants[:4])
    dx, *dweights = products(dgates, x, y, h0, w_ih, *rows, wanted[0], any_weights)
    dw_hr = None if hidden is None else dh.mT @ hidden
    return _wanted(wanted[:3], wants, (dx, dh0, dc0), (*dweights, dw_hr, du))


def _wanted(wanted: tuple, wants: tuple, gradients: tuple, dweights: tuple) -> list[Tensor]:
    """Of dx, dh0, dc0 and of the gradients [D, *] of the weights those that are wanted, one by one."""
    found = [g for g, want in zip(gradients, wanted, strict=True) if want]
    for gradient, each in zip(dweights, wants, strict=True):
        found += [gradient[d] for d, want in enumerate(each) if want]
    return found


def _gradients_of_each(form: Form, V: int, wanted: tuple, args: tuple, dims: tuple) -> tuple[Tensor, ...]:
    """_gradients [V, *] of V scans with the same weights: one backward scan of all, and products for each."""
    _, lengths, reset, y, saved, all_c, dy, dh_n, dc_n, dall_c, x, h0, c0 = (
        _front(a, d, V) for a, d in zip(args[:13], dims[:13], strict=True)
    )
    D, B, batch_first = h0.shape[1], h0.shape[2], form.batch_first
    w_ih, w_hh, _, _, w_hr, _ = form.split(args[13:], D)
    wants = form.split(wanted[3:], D)
    saves = [_fold_saved(t, B, batch_first) for t in (dall_c, saved, all_c)]
    dgates, dh0, dc0, dh, _, _ = _BACKWARD[form.name](
        _fold_rows(dy, B, batch_first), _fold_state(dh_n), _fold_state(dc_n), *saves,
        _fold_rows(y, B, batch_first), _fold_state(h0), _fold_state(c0), w_hh, w_hr, (), None,
        _fold_lengths(lengths), _fold_rows(reset, B, batch_first), batch_first, False,
    )  # fmt: skip
    dgates = _unfold_saved(dgates, V, B, batch_first)

    def products(dgates, x, y, h0, lengths, reset):
        rows = (None, lengths, reset, batch_first)
        return composed_products(form.cell, dgates, x, y, h0, w_ih, *rows, True, True)

    mapped = (dgates, x, y, h0, lengths, reset)
    in_dims = tuple(None if t is None else 0 for t in mapped)
    dx, *dweights = torch.func.vmap(products, in_dims=in_dims)(*mapped)
    dw_hr = None
    if any(wants[4]):
        dw_hr = _unfold_saved(dh, V, B, batch_first).mT @ form.cell.hidden(saved, all_c)
    first = (dx, _unfold_state(dh0, V), _unfold_state(dc0, V))
    return tuple(
        _wanted(
            wanted[:3],
            wants,
            first,
            (*(g if g is None else g.movedim(1, 0) for g in (*dweights, dw_hr)), None),
        )
    )


def _reference_outputs(form: Form, rows, inputs) -> tuple[Tensor, ...]:
    """(y, h_n), and (c_n, every c) of a cell that has one, of the reference."""
    x, h0, c0, *weights = inputs
    layout = Sequence(form.batch_first, *rows).layout(x.shape[0], h0.shape[1])
    y, h_n, c_n, all_c = reference.forward(form.cell, layout, x, h0, c0, *form.split(weights, h0.shape[0]))
    return (y, h_n, c_n, all_c) if form.cell.has_c else (y, h_n)


def _reference_gradients(form: Form, rows, wanted: tuple, tensors, varying: list[int]) -> Callable:
    """ScanGrad from the reference, as a function of some of ``tensors``: the four gradients (None: zero), x,
    h0, c0 and the weights."""

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        full = _replaced(tensors, varying, given)
        gradients, inputs = full[:4], full[4:]
        chosen = [i for i, want in enumerate(wanted) if want]

        def outputs(*chosen_inputs):
            return _reference_outputs(form, rows, _replaced(inputs, chosen, chosen_inputs))

        results, pull = torch.func.vjp(outputs, *(inputs[i] for i in chosen))
        return pull(_or_zeros(gradients[: len(results)], results))

    return function


def _or_zeros(gradients: Iterable[Maybe], outputs: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of the outputs, zeros for those that are missing."""
    return tuple(torch.zeros_like(o) if g is None else g for g, o in zip(gradients, outputs, strict=True))


def _present(tensors: Iterable[Maybe]) -> list[int]:
    return [i for i, t in enumerate(tensors) if t is not None]


def _replaced(tensors: Iterable[Maybe], positions: list[int], by: Iterable[Tensor]) -> list[Maybe]:
    full = list(tensors)
    for i, t in zip(positions, by, strict=True):
        full[i] = t
    return full


def _is_last_use(saved: Tensor) -> bool:
    """Whether the back-propagation under way may write over what the forward scan saved for it: torch.compile
    asks the same before it gives such memory away."""
    keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
    mapped = _is_traced() or _legacy_vmap_level() > 0
    return not mapped and saved.is_contiguous() and not keeps_graph()


# ---- Forward mode ------------------------------------------------------------------------------------


def _forward_mode_on(jvp):
    """torch turns forward mode off inside a jvp rule, which then drops the tangents of the levels around it
    in silence: the second derivative of jacfwd(jacfwd(f)) would be wrong."""

    @wraps(jvp)
    def rule(ctx: Any, *tangents):
        with forward_ad._set_fwd_grad_enabled(True):
            return jvp(ctx, *tangents)

    return rule


class DualScan(Scan):
    """Scan with a forward-mode derivative. A class of its own, because torch.compile refuses Functions that
    have one."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        Scan.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[4:])

    @staticmethod
    @_one_by_one_in_legacy_vmap
    @_forward_mode_on
    def jvp(ctx: Any, *tangents):
        form = Form(*ctx.form)
        rows, tensors = _primals(ctx.saved_tensors[:3]), _primals(ctx.saved_tensors[3:])
        moving = _present(tangents[7:])

        def function(*given):
            return _reference_outputs(form, rows, _replaced(tensors, moving, given))

        pushed = _push_forward(function, [tensors[i] for i in moving], [tangents[7 + i] for i in moving])
        return (*pushed, None) if form.cell.has_c else (*pushed, None, None, None)


class DualScanGrad(ScanGrad):
    """ScanGrad with a forward-mode derivative: forward over reverse, as in torch.func.hessian."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ScanGrad.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[6:9], *inputs[12:])

    @staticmethod
    @_one_by_one_in_legacy_vmap
    @_forward_mode_on
    def jvp(ctx: Any, *tangents):
        rows, tensors = _primals(ctx.saved_tensors[:3]), _primals(ctx.saved_tensors[3:])
        moving = _present(tangents[12:])
        function = _reference_gradients(Form(*ctx.form), rows, ctx.wanted, tensors, moving)
        return _push_forward(function, [tensors[i] for i in moving], [tangents[12 + i] for i in moving])


def _primals(tensors: tuple) -> list[Maybe]:
    """Without the tangents of this level, but with those of the levels around it."""
    return [None if t is None else forward_ad.unpack_dual(t).primal for t in tensors]


def _push_forward(function, at: list[Tensor], tangents: list[Tensor]) -> tuple:
    """J v as the transpose of v -> v^T J: forward mode cannot be nested in a jvp rule at its own level."""
    outputs, vjp = torch.func.vjp(function, *at)
    _, transpose = torch.func.vjp(vjp, tuple(torch.zeros_like(o) for o in outputs))
    return transpose(tuple(tangents))[0]


# ---- Helpers of vmap: the mapped dimension V, always first here, folded into the batch and out again ---


def _front(t: Maybe, dim: int | None, V: int) -> Maybe:
    if t is None:
        return None
    return t.expand(V, *t.shape) if dim is None else t.movedim(dim, 0)


def _one_by_one(function, V: int, options: tuple, args: tuple, dims: tuple):
    """Mapped weights and packed sequences: one call each."""
    results = [
        function.apply(
            *options, *(a if d is None else a.select(d, v) for a, d in zip(args, dims, strict=True))
        )
        for v in range(V)
    ]
    outputs = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return outputs, (0,) * len(outputs)


def _fold_lengths(t: Maybe) -> Maybe:  # [V, B] -> [V*B]
    return None if t is None else t.flatten()


def _fold_state(t: Maybe) -> Maybe:  # [V, D, B, *] -> [D, V*B, *]
    return None if t is None else t.movedim(0, 1).flatten(1, 2)


def _unfold_state(t: Tensor, V: int) -> Tensor:
    return t if t.dim() == 1 else t.unflatten(1, (V, t.shape[1] // V)).movedim(1, 0)


def _fold_rows(t: Maybe, B: int, batch_first: bool) -> Maybe:  # [V, N, *] -> [V*N, *]
    if t is None or batch_first or B == 0:
        return None if t is None else t.flatten(0, 1)
    return t.unflatten(1, (-1, B)).movedim(0, 1).flatten(0, 2)


def _unfold_rows(t: Tensor, V: int, B: int, batch_first: bool) -> Tensor:
    if batch_first or B == 0:
        return t.unflatten(0, (V, t.shape[0] // V))
    return t.unflatten(0, (-1, V, B)).movedim(1, 0).flatten(1, 2)


def _fold_saved(t: Maybe, B: int, batch_first: bool) -> Maybe:  # [V, D, N, *] -> [D, V*N, *]
    if t is None or t.dim() < 4:  # [V, 0]: nothing is saved
        return None if t is None else t.new_empty(0)
    return torch.stack([_fold_rows(t[:, d], B, batch_first) for d in range(t.shape[1])])  # type: ignore[misc]


def _unfold_saved(t: Tensor, V: int, B: int, batch_first: bool) -> Tensor:
    if t.dim() == 1:
        return t
    return torch.stack([_unfold_rows(one, V, B, batch_first) for one in t], 1)


# ---- The gradients of weights and input from torch operations: for vmap, and for the tests ---------------


def composed_products(
    cell, dgates, x, y, h0, w_ih, batch_sizes, lengths, reset, batch_first, inputs, weights
):
    """The operator ``fastrnn::<cell>_products``."""
    D, _, P = h0.shape
    dgx = input_gradients(cell, dgates)
    dx = sum(dgx[d] @ w_ih[d] for d in range(D)) if inputs else None
    if not weights:
        return dx, None, None, None, None
    sequence = Sequence(batch_first, batch_sizes, lengths, reset)
    dga = recurrent_gradients(cell, dgates)
    before = [previous_rows(y[:, d * P : (d + 1) * P], h0[d], sequence, d) for d in range(D)]
    x = sequence.layout(x.shape[0], h0.shape[1]).without_padding(x)
    dw_ih = torch.stack([dgx[d].T @ x for d in range(D)])
    dw_hh = torch.stack([dga[d].T @ before[d] for d in range(D)])
    return dx, dw_ih, dw_hh, dgx.sum(1), dga.sum(1)


# ---- What the layers call ----------------------------------------------------------------------------


def previous_rows(y: Tensor, h0: Tensor, sequence: Sequence, direction: int) -> Tensor:
    """h_{t-1} of every row: y [N, P] one step later, h0 [B, P] where a row begins, zero after a reset."""
    batch_first, batch_sizes, lengths, reset = sequence
    B, N = h0.shape[0], y.shape[0]
    if B == 0:
        return y
    if batch_sizes is not None:
        before = torch.cat((h0, y))[_previous_index(batch_sizes, B, N, direction).to(y.device)]
    else:
        dim = 1 if batch_first else 0
        steps = y.unflatten(0, (B, -1) if batch_first else (-1, B))
        T = steps.shape[dim]
        if direction == 0:
            parts = (h0.unsqueeze(dim), steps.narrow(dim, 0, T - 1))
        else:
            parts = (steps.narrow(dim, 1, T - 1), h0.unsqueeze(dim))
        shifted = torch.cat(parts, dim)
        if direction == 1 and lengths is not None:
            last = torch.arange(T, device=lengths.device).unsqueeze(1 - dim) == (lengths - 1).unsqueeze(dim)
            shifted = torch.where(last.unsqueeze(-1).to(y.device), h0.unsqueeze(dim), shifted)
        before = shifted.flatten(0, 1)
    return before if reset is None else torch.where(reset.unsqueeze(1), torch.zeros_like(before), before)


def _previous_index(batch_sizes: Tensor, B: int, N: int, direction: int) -> Tensor:
    """For each packed row, where its previous one lies in (h0, y)."""
    T = batch_sizes.shape[0]
    first = batch_sizes.cumsum(0) - batch_sizes
    t, b = packed_places(batch_sizes, N)
    before = t - 1 if direction == 0 else t + 1
    inside = before.clamp(0, T - 1)
    exists = (before == inside) & (b < batch_sizes[inside])
    return torch.where(exists, B + first[inside] + b, b)


def packed_places(batch_sizes: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """The step of each packed row and its place in that step, both [N]."""
    first = batch_sizes.cumsum(0) - batch_sizes
    device = batch_sizes.device
    t = torch.repeat_interleave(torch.arange(len(batch_sizes), device=device), batch_sizes, output_size=N)
    return t, torch.arange(N, device=device) - first[t]


class Weights(NamedTuple):
    """The parameters of one layer, for each of its D directions."""

    w_ih: Tensors  # [G*H, I]
    w_hh: Tensors  # [G*H, P]
    b_ih: Tensors = ()  # [G*H], or none
    b_hh: Tensors = ()  # [G*H], or none
    w_hr: Tensors = ()  # [P, H], or none
    u: Tensors = ()  # [U, H], or none: vectors of parameters


def scan(
    name: str,
    x: Tensor,
    h0: Tensor,
    c0: Maybe,
    weights: Weights,
    sequence: Sequence,
    all_c: bool = False,
    listener: Callable[[Tensor, Tensor], Any] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer: (y [N, D*P], h_n [D, B, P], c_n [D, B, H], every c [D, N, H] if all_c).

    x [N, I]; h0 [D, B, P]; c0 [D, B, H] for cells that have one, else None. ``listener`` is called with the
    complete dL/dh_t [D, N, P] and dL/dc_t [D, N, H] (without c: [0]) of every row at each back-propagation.
    """
    if c0 is h0 and c0 is not None:
        c0 = c0.view_as(c0)  # torch.compile takes no tensor twice
    tensors = (x, h0, c0, *(t for part in weights for t in part))
    options = (sequence.batch_sizes, sequence.lengths, sequence.reset)
    needed = _is_dual() or _needs_function(tensors)
    save = SAVE_EVERY_C if all_c and c0 is not None else SAVE_NOTHING
    packed = _prepack.find(weights, needed) if _prepack.packs and not _is_traced() else None
    if needed:
        y, h_n, c_n, c, _ = _scan_function().apply(
            name, sequence.batch_first, len(weights.b_ih) > 0, len(weights.w_hr) > 0, *options, *tensors
        )
        if listener is not None and y.grad_fn is not None:
            y.grad_fn.listener = listener  # the ctx of Scan.backward
    elif packed is not None:
        y, h_n, c_n, _, c = _PACKED[name](x, h0, c0, packed, *options, sequence.batch_first, save)
    else:
        y, h_n, c_n, _, c = _FORWARD[name](x, h0, c0, *weights, *options, sequence.batch_first, save)
    return y, h_n, c_n, c


def _is_dual() -> bool:
    """Whether forward-mode derivatives are being taken."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def _scan_function() -> type[Scan]:
    if _is_dual():
        return DualScan
    return Scan if _is_traced() else EagerScan


def _grad_function() -> type[ScanGrad]:
    return DualScanGrad if _is_dual() else ScanGrad


def _without_autocast(x: Tensor):
    """What is computed for back-propagation has the dtype of the scan, also inside a region of autocast."""
    if not torch._C._is_any_autocast_enabled():
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _needs_function(tensors: tuple) -> bool:
    if torch.jit.is_tracing():  # operators alone: the trace is checked against one without gradients
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return True
    return _is_traced() and not torch.compiler.is_compiling()


def _is_traced() -> bool:
    """Whether torch.compile, torch.export or a transform of torch.func looks on."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
