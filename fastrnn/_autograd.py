"""A scan as a differentiable function.

Scan is one layer, and ScanGrad its gradients as a function of their own. The kernels compute both. What is
derived further (second derivatives, forward mode) follows from the formulas in reference.py alone.

Functions of torch.autograd take tensors one by one. They come here in this order: batch_sizes, lengths,
reset (the rows), with them the masks of options, then what a scan has kept (y, the history of the states
beside h, the saved numbers, states before their zoneout), gradients, and the inputs: x, the initial states,
the slots of the weights of every direction, and with options the states of a reset.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _operators, _prepack, _vmap, reference
from ._operators import Keep, Maybe
from .reference import CELLS, SLOTS, W_HR, U
from .rows import Rows
from .step_options import NO_OPTIONS, StepOptions

__all__ = ["Weights", "scan"]

Weights = Sequence[Maybe]  # of one layer: SLOTS for each direction
Listener = Callable[[list[Tensor]], Any]


class Form(NamedTuple):
    """What a scan is, besides its tensors."""

    name: str
    batch_first: bool
    numbers: tuple[float, ...] | None = None  # StepOptions.numbers

    @property
    def cell(self) -> reference.Cell:
        return CELLS[self.name]

    @property
    def kept(self) -> int:
        """How many tensors a scan keeps for its way back: y, the history of the other states, saved, and
        states before their zoneout."""
        cell = self.cell
        return cell.states + (cell.saved > 0) + len(_operators.zoned_after(cell, self.numbers))

    @property
    def rows(self) -> int:
        return ROWS if self.numbers is None else ROWS + MASKS

    def split(self, inputs: Sequence) -> tuple:
        """x, the states, the weights and reset_to, of a scan's inputs."""
        S = self.cell.states
        end = len(inputs) if self.numbers is None else len(inputs) - S
        return inputs[0], inputs[1 : 1 + S], inputs[1 + S : end], inputs[end:]


ROWS = 3  # batch_sizes, lengths, reset
MASKS = 4  # StepOptions.masks
FORM = 3  # the fields of Form, before the tensors


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
        each = zip(*(torch._remove_batch_dim(tensors[i], level, 1, 0) for i in batched), strict=True)  # type: ignore[arg-type]
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
    """(y, the last states, the history of those beside h, saved) of one layer. ``saved`` belongs to the
    kernels, is missing where a cell saves nothing, and has no derivative."""

    @staticmethod
    def forward(name, batch_first, numbers, *tensors):
        form = Form(name, batch_first, numbers)
        rows, (x, states, weights, reset_to) = tensors[:ROWS], form.split(tensors[form.rows :])
        more = _operators.with_options(numbers, tensors[ROWS : form.rows], reset_to)
        y, last, history, saved = (_operators.scan_options if more else _operators.scan)(
            name, x, states, *_operators.given(weights), None, *rows, batch_first, Keep.FOR_BACKWARD, *more
        )
        return y, *last, *history, *saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        cell = CELLS[inputs[0]]
        ctx.form, ctx.may_write, ctx.watched, ctx.listener = inputs[:FORM], False, (), None
        ctx.mark_non_differentiable(*output[2 * cell.states :])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*_kept(cell, output), *inputs[FORM:])

    @staticmethod
    @_one_by_one_in_legacy_vmap
    def backward(ctx: Any, *gradients):  # type: ignore[override]
        form = Form(*ctx.form)
        cell, tensors = form.cell, ctx.saved_tensors
        gradients = gradients[: 2 * cell.states]
        kept, rest = tensors[: form.kept], tensors[form.kept :]
        rows, inputs = rest[: form.rows], rest[form.rows :]
        wanted = tuple(ctx.needs_input_grad[FORM + form.rows :])
        if any(version != output._version for output, version in ctx.watched):
            # An output was changed in place since. Scanning once more costs time in this rare case alone;
            # a copy of y would cost memory in every call.
            with torch.no_grad():
                kept = _kept(cell, Scan.forward(*form, *rest))
        with _without_autocast(inputs[0]):
            if _is_dual() or _needs_function((*gradients, *inputs)):
                arguments = (*rows, *kept, *gradients, *inputs)
                found = _grad_function().apply(*form, wanted, ctx.listener, *arguments)
            else:
                over = ctx.may_write and _is_last_use(kept[cell.states])
                found = _gradients(form, wanted, ctx.listener, over, rows, kept, gradients, inputs)
        remaining = iter(found)
        return (None,) * (FORM + form.rows) + tuple(next(remaining) if want else None for want in wanted)

    @staticmethod
    def vmap(info, in_dims, name, batch_first, numbers, *tensors):
        form = Form(name, batch_first, numbers)
        return _vmap.scan(_scan_function(), info.batch_size, form, tensors, in_dims[FORM:])


class EagerScan(Scan):
    """Scan for ordinary calls. torch inspects the signature of a Function with a setup_context at every call,
    which took a third of a single step."""

    setup_context = torch.autograd.Function.setup_context

    @staticmethod
    def forward(ctx, name, batch_first, numbers, *tensors):  # type: ignore[override]
        output = Scan.forward(name, batch_first, numbers, *tensors)
        cell = CELLS[name]
        ctx.form, ctx.listener = (name, batch_first, numbers), None
        ctx.set_materialize_grads(False)
        outputs = (output[0], *output[1 + cell.states : 2 * cell.states])
        saved = output[2 * cell.states :]
        ctx.mark_non_differentiable(*saved)
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
            # torch.nn's outputs may be changed in place before backward. So aliases with version counters of
            # their own are saved, which torch does not check, and the outputs' counters are watched.
            ctx.watched = [(t.detach(), t._version) for t in outputs]
            ctx.may_write = cell.reuses_saved
            ctx.save_for_backward(*(t.data for t in outputs), *saved, *tensors)
        else:  # what saved-tensor hooks get is theirs: they may keep it, or return memory that is read-only
            ctx.watched, ctx.may_write = (), False
            ctx.save_for_backward(*(t.clone() for t in outputs), *saved, *tensors)
        return output


class ScanGrad(torch.autograd.Function):
    """The gradients of a scan that are ``wanted`` (a flag for each input), as a function of the gradients of
    its outputs and of its inputs. What the scan has kept only spares the kernels to compute it again: the
    derivative of this function is that of the reference."""

    @staticmethod
    def forward(name, batch_first, numbers, wanted, listener, *tensors):
        form = Form(name, batch_first, numbers)
        return tuple(_gradients(form, wanted, listener, False, *_grouped(form, tensors)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.form, ctx.wanted, tensors = inputs[:FORM], inputs[FORM], inputs[FORM + 2 :]
        form = Form(*ctx.form)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[: form.rows], *tensors[form.rows + form.kept :])

    @staticmethod
    @_one_by_one_in_legacy_vmap
    def backward(ctx: Any, *gradients: Maybe):  # type: ignore[override]
        form = Form(*ctx.form)
        rows, tensors = ctx.saved_tensors[: form.rows], ctx.saved_tensors[form.rows :]
        present = _present(tensors)
        with _without_autocast(tensors[2 * form.cell.states]):
            function = reference_gradients(form, rows, ctx.wanted, tensors, present)
            outputs, pull = torch.func.vjp(function, *(tensors[i] for i in present))  # type: ignore[misc]
            found = pull(_or_zeros(gradients, outputs))
        nothing = (None,) * (FORM + 2 + form.rows + form.kept)
        return nothing + tuple(_replaced([None] * len(tensors), present, found))

    @staticmethod
    def vmap(info, in_dims, name, batch_first, numbers, wanted, listener, *tensors):
        form, V, dims = Form(name, batch_first, numbers), info.batch_size, in_dims[FORM + 2 :]
        grouped, grouped_dims = _grouped(form, tensors), _grouped(form, dims)
        (_, _, *derivable), (rows_dims, kept_dims, _, inputs_dims) = grouped, grouped_dims
        flat, flat_dims = [t for part in derivable for t in part], dims[form.rows + form.kept :]
        derived_further = _is_traced() or _needs_function(tuple(flat))
        dense, shared_weights = (
            grouped[0][0] is None,
            all(d is None for d in inputs_dims[1 + form.cell.states :]),
        )
        if (
            dense
            and shared_weights
            and kept_dims[0] is not None
            and not derived_further
            and not form.cell.vectors
            and numbers is None
        ):
            found = _vmap.gradients(form, V, wanted, grouped, grouped_dims)
        elif derived_further and not any(d is not None for d in rows_dims):
            present = _present(flat)
            function = reference_gradients(form, grouped[0], wanted, flat, present)
            mapped = torch.func.vmap(function, in_dims=tuple(flat_dims[i] for i in present))
            found = mapped(*(flat[i] for i in present))
        else:
            options = (*form, wanted, listener)
            return _vmap.one_by_one(_grad_function(), V, options, tensors, dims)
        return found, (0,) * len(found)


def _kept(cell: reference.Cell, output: Sequence) -> tuple:
    """y, the history of the states beside h, and saved, of what Scan gives."""
    return (output[0], *output[1 + cell.states :])


def _grouped(form: Form, tensors: Sequence) -> tuple:
    """Rows, what was kept, gradients, and inputs, of ScanGrad's tensors."""
    rows, kept = form.rows, form.rows + form.kept
    gradients = kept + 2 * form.cell.states
    return tensors[:rows], tensors[rows:kept], tensors[kept:gradients], tensors[gradients:]


def _gradients(form: Form, wanted, listener, over, rows, kept, gradients, inputs) -> list[Tensor]:
    """The wanted gradients of x, the states and the weights, from the kernels. ``over`` lets these write over
    what was saved."""
    cell, S, numbers = form.cell, form.cell.states, form.numbers
    x, states, weights, reset_to = form.split(inputs)
    y, history, saved = kept[0], kept[1:S], kept[S] if cell.saved else None
    options, masks = (*rows[:ROWS], form.batch_first), rows[ROWS:]
    fresh: list[Maybe] = [None, None]
    for k, t in zip(_operators.zoned_after(cell, numbers), kept[S + (cell.saved > 0) :], strict=True):
        fresh[k] = t
    wanted_weights, given = wanted[1 + S : 1 + S + len(weights)], _operators.given(weights)
    hidden = None
    if any(wanted_weights[W_HR::SLOTS]) and cell.hidden is not None:
        hidden = cell.hidden(saved, *history if fresh[1] is None else fresh[1:])  # before it is written over
    arguments = (gradients[0], gradients[1 : 1 + S], gradients[1 + S :], y, history, saved, states, *given)
    keep = listener is not None
    more = _operators.with_options(numbers, masks, reset_to, fresh)
    if over:
        backward: Callable = _operators.scan_backward_over_options if more else _operators.scan_backward_over
        dstates, complete, du = backward(form.name, *arguments, *options, keep, *more)
        torch.autograd.graph.increment_version(saved)  # type: ignore[arg-type]
        dgates = saved
    else:
        backward = _operators.scan_backward_options if more else _operators.scan_backward
        dgates, dstates, complete, du = backward(form.name, *arguments, *options, keep, *more)
    if listener is not None:
        listener(complete)
    products: Callable = _operators.weight_gradients_options if more else _operators.weight_gradients
    rounds = _operators.rounds_products(states, weights)
    if (rounds or x.is_cuda) and not _is_traced():  # past the dispatcher, which takes longer than a product
        products = _operators.weight_gradients_of_torch
    elif rounds:
        products = _operators.composed_weight_gradients
    of_weights = any(any(wanted_weights[slot::SLOTS]) for slot in cell.product_slots)
    of_x = wanted[0] and not cell.takes_gates
    more = _operators.with_options(numbers, masks, reset_to)
    dx, dweights = products(form.name, dgates, x, y, states, *given, *options, of_x, of_weights, *more)
    if wanted[0] and cell.takes_gates:
        dx = [_operators.input_gradients(cell, dgates).transpose(0, 1).flatten(1)]  # type: ignore[arg-type]
    dw_hr = []
    if hidden is not None:
        dh = complete[0]
        if numbers is not None and numbers[0] > 0:  # the part of it that zoneout lets through
            dh = (1 - numbers[0]) * dh if masks[0] is None else dh.masked_fill(masks[0], 0)
        if rounds:
            dh, hidden = dh.bfloat16(), hidden.bfloat16()
        dw_hr = [dh[d].T @ hidden[d] for d in range(len(hidden))]
    dresets = [] if numbers is None else dstates[S:] or [None] * S
    return chosen(cell, wanted, dx, dstates[:S], dweights, dw_hr, du, dresets)


def chosen(
    cell: reference.Cell, wanted: Sequence[bool], dx, dstates, dweights, dw_hr, du, dresets=()
) -> list[Tensor]:
    """Of all gradients, lists that are empty where none of theirs is wanted, those that are wanted."""
    found: list = [*dx] if dx else [None]
    found += dstates
    products = iter(dweights)
    for d in range((len(wanted) - len(found) - len(dresets)) // SLOTS):
        of_direction = [None] * SLOTS
        for slot in cell.product_slots if dweights else ():
            of_direction[slot] = next(products)
        of_direction[W_HR] = dw_hr[d] if dw_hr else None
        of_direction[U] = du[d] if du else None
        found += of_direction
    found += dresets
    return [gradient for gradient, want in zip(found, wanted, strict=True) if want]


def _reference_outputs(form: Form, rows, inputs) -> tuple[Tensor, ...]:
    """(y, the last states, the history of those beside h) of the reference."""
    x, states, weights, reset_to = form.split(inputs)
    if _operators.rounds_products(states, weights):
        x, weights = x.float(), [None if w is None else w.float() for w in weights]
    layout = Rows.of(x.shape[0], states[0].shape[1], form.batch_first, *rows[:ROWS])
    options = NO_OPTIONS
    if form.numbers is not None:
        options = StepOptions.of(form.numbers, rows[ROWS:], reset_to)
    y, last, history = reference.forward(form.cell, layout, x, states, weights, options)
    return y, *last, *history


def reference_gradients(form: Form, rows, wanted: tuple, tensors, varying: list[int]) -> Callable:
    """ScanGrad from the reference, as a function of some of ``tensors``: the gradients (None: zero) and the
    inputs."""

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        full = _replaced(tensors, varying, given)
        gradients, inputs = full[: 2 * form.cell.states], full[2 * form.cell.states :]
        wanted_inputs = [i for i, want in enumerate(wanted) if want]

        def outputs(*some):
            return _reference_outputs(form, rows, _replaced(inputs, wanted_inputs, some))

        results, pull = torch.func.vjp(outputs, *(inputs[i] for i in wanted_inputs))  # type: ignore[misc]
        return pull(_or_zeros(gradients, results))

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
        ctx.save_for_forward(*inputs[FORM:])

    @staticmethod
    @_one_by_one_in_legacy_vmap
    @_forward_mode_on
    def jvp(ctx: Any, *tangents):
        form = Form(*ctx.form)
        saved = _primals(ctx.saved_tensors)
        rows, tensors = saved[: form.rows], saved[form.rows :]
        tangents = tangents[FORM + form.rows :]
        moving = _present(tangents)

        def function(*given):
            return _reference_outputs(form, rows, _replaced(tensors, moving, given))

        pushed = _push_forward(function, [tensors[i] for i in moving], [tangents[i] for i in moving])
        return (*pushed, *[None] * (form.kept - form.cell.states))


class DualScanGrad(ScanGrad):
    """ScanGrad with a forward-mode derivative: forward over reverse, as in torch.func.hessian."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ScanGrad.setup_context(ctx, inputs, output)
        form, tensors = Form(*ctx.form), inputs[FORM + 2 :]
        ctx.save_for_forward(*tensors[: form.rows], *tensors[form.rows + form.kept :])

    @staticmethod
    @_one_by_one_in_legacy_vmap
    @_forward_mode_on
    def jvp(ctx: Any, *tangents):
        form = Form(*ctx.form)
        saved = _primals(ctx.saved_tensors)
        rows, tensors = saved[: form.rows], saved[form.rows :]
        tangents = tangents[FORM + 2 + form.rows + form.kept :]
        moving = _present(tangents)
        function = reference_gradients(form, rows, ctx.wanted, tensors, moving)
        return _push_forward(function, [tensors[i] for i in moving], [tangents[i] for i in moving])


def _primals(tensors: tuple) -> list[Maybe]:
    """Without the tangents of this level, but with those of the levels around it."""
    return [None if t is None else forward_ad.unpack_dual(t).primal for t in tensors]


def _push_forward(function, at: list, tangents: list) -> tuple:
    """J v as the transpose of v -> v^T J: forward mode cannot be nested in a jvp rule at its own level."""
    outputs, vjp = torch.func.vjp(function, *at)  # type: ignore[misc]
    _, transpose = torch.func.vjp(vjp, tuple(torch.zeros_like(o) for o in outputs))  # type: ignore[misc]
    return transpose(tuple(tangents))[0]


# ---- What the layers call ----------------------------------------------------------------------------


def scan(
    name: str,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Weights,
    rows: Rows,
    keep_history: bool = False,
    listener: Listener | None = None,
    options: StepOptions = NO_OPTIONS,
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
    """One layer: (y [N, D*P], h_n [D, B, P] and the other last states [D, B, H], and where these are kept the
    history of those beside h [D, N, H]).

    x [N, I]; states: h0 [D, B, P] and the others [D, B, H]. ``listener`` is called with the complete
    gradients of every state, dL/dh_t [D, N, P] and others [D, N, H], at each back-propagation.
    """
    if len(states) > 1 and (states[1] is states[0] or len(states) > 2):
        states = (states[0], *(t.view_as(t) for t in states[1:]))  # torch.compile takes no tensor twice
    places: tuple[Maybe, ...] = (rows.batch_sizes, rows.lengths, rows.reset)
    tensors = (x, *states, *weights)
    numbers, masks, reset_to = None, cast(tuple[Maybe, ...], ()), cast(tuple[Maybe, ...], ())
    if options is not NO_OPTIONS and (numbers := options.numbers) is not None:
        masks, reset_to = options.masks, options.reset_to or (None,) * len(states)
        tensors += reset_to
    needed = _is_dual() or _needs_function(tensors)
    packed = _prepack.find(weights, needed) if _prepack.packs and not _is_traced() else None
    S = len(states)
    if needed:
        y, *results = _scan_function().apply(name, rows.batch_first, numbers, *places, *masks, *tensors)
        if listener is not None and y.grad_fn is not None:
            y.grad_fn.listener = listener  # the ctx of Scan.backward
        return y, results[:S], results[S : 2 * S - 1]
    keep = Keep.HISTORY if keep_history else Keep.NOTHING
    given = _operators.given(weights if packed is None else ())
    more = _operators.with_options(numbers, masks, reset_to)
    operator = _operators.scan_options if more else _operators.scan
    y, last, history, _ = operator(name, x, states, *given, packed, *places, rows.batch_first, keep, *more)
    return y, last, history


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
