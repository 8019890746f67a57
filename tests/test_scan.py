"""The operators, forward and backward, give what the reference gives, for every way rows can lie."""

import itertools

import pytest
import torch
from scans import CELL_NAMES, FORMS, KINDS, make_scan

from fastrnn import _operators
from fastrnn.reference import CELLS
from fastrnn.rows import Rows

ODD_SIZES = (1, 3, 7, 17, 65, 129)
NAMES = ("y", "h_n", "c_n", "saved", "saved_c")
GRADIENT_NAMES = ("dgates", "dh0", "dc0", "dh", "dc", "du")


def assert_same(ours, theirs, names, tolerance=1e-12):
    for name, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_scan_is_reference(scan, wanted=("all",)):
    expected = scan.reference()
    assert_same(scan.kernel(), expected, NAMES)
    for save in (0, 2):
        *states, saved, saved_c = scan.kernel(save)
        assert_same(states, expected[:3], NAMES[:3])
        assert saved.numel() == 0
        if save == 2 and scan.c0 is not None:
            assert_same([saved_c], expected[4:], NAMES[4:])
        else:
            assert saved_c.numel() == 0
    for which in wanted:
        gradients = scan.gradients(expected, which)
        for keep in (True, False):
            found = scan.kernel_backward(expected, gradients, keep)
            assert_same(found, scan.reference_backward(expected, gradients, keep), GRADIENT_NAMES)
            if CELLS[scan.name].reuses_saved:
                in_place = scan.kernel_backward_in_place(expected, gradients, keep)
                assert_same(in_place, found, GRADIENT_NAMES, tolerance=0)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("H", ODD_SIZES)
@pytest.mark.parametrize("form", ["time_major", "batch_first", "packed", "lengths_batch_first"])
def test_kernels_equal_the_reference_at_every_size(name, H, form):
    for B, D, T, I in [(1, 1, 1, 3), (1, 2, 4, 1), (2, 1, 4, 19), (5, 2, 1, 33), (5, 1, 4, 1)]:
        assert_scan_is_reference(make_scan(name, T, B, H, D=D, I=I, bias=B != 2, **FORMS[form]))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("form", ["time_major", "lengths_batch_first", "packed_reset"])
@pytest.mark.parametrize("wanted", ["first", "y", "h", "c", "all_c"])
def test_any_combination_of_gradients_may_be_missing(name, form, wanted):
    for P in (None, 7) if CELLS[name].hidden else (None,):
        assert_scan_is_reference(make_scan(name, 3, 4, 17, D=2, P=P, **FORMS[form]), (wanted,))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("H", "P"), [(2, 1), (7, 3), (17, 16), (65, 33), (129, 128), (3, 7)])
def test_projection_equals_the_reference(form, H, P):
    for B, D, T in [(1, 1, 1), (1, 2, 5), (4, 1, 5), (4, 2, 1)]:
        assert_scan_is_reference(make_scan("lstm", T, B, H, D=D, P=P, **FORMS[form]))


@pytest.mark.parametrize("name", CELL_NAMES)
def test_work_shared_among_threads_equals_the_reference(name, threads):
    # B = 1: by units. B = 33: by rows. H = 257: several blocks of units, the last one ragged.
    for B, form in [(1, "time_major"), (2, "batch_first"), (33, "lengths"), (9, "packed_reset")]:
        for P in (None, 130) if CELLS[name].hidden else (None,):
            assert_scan_is_reference(make_scan(name, 4, B, 257, D=2, P=P, **FORMS[form]))


@pytest.mark.parametrize("name", CELL_NAMES)
@pytest.mark.parametrize("T", [2, 4])
@pytest.mark.parametrize("B", [2, 5])
def test_weights_beyond_the_caches_equal_the_reference(name, T, B):
    # Packed or read where they lie, by the number of steps; deeper than one pass over a panel.
    assert_scan_is_reference(make_scan(name, T, B, 1090 if name.startswith("rnn") else 530))


@pytest.mark.parametrize("name", CELL_NAMES)
@pytest.mark.parametrize("B", [48, 49, 97])
def test_more_rows_than_one_chunk_equal_the_reference(name, B):
    for form in ("time_major", "packed_reset", "lengths"):
        assert_scan_is_reference(make_scan(name, 3, B, 19, **FORMS[form]))


@pytest.mark.parametrize("name", CELL_NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_the_reference(name, form):
    for B in (1, 6):
        assert_scan_is_reference(make_scan(name, 5, B, 17, D=2, **FORMS[form]))


@pytest.mark.parametrize("P", [None, 33])
@pytest.mark.parametrize("form", ["lengths", "packed"])
def test_a_thread_without_rows_in_a_step_writes_nothing(form, P, threads):
    """Rows that end early leave whole teams without work, and reversed ones begin without any."""
    for seed in range(4):
        assert_scan_is_reference(make_scan("lstm", 7, 3, 66, D=2, P=P, seed=seed, **FORMS[form]))


@pytest.mark.parametrize("name", CELL_NAMES)
def test_long_sequences_equal_the_reference(name):
    assert_scan_is_reference(make_scan(name, 200, 3, 9, D=2))


@pytest.mark.parametrize("name", CELL_NAMES)
@pytest.mark.parametrize("batch_first", [False, True])
def test_an_empty_batch_gives_empty_results(name, batch_first):
    scan = make_scan(name, 3, 0, 5, D=2, batch_first=batch_first)
    outputs = scan.kernel()
    cell = CELLS[name]
    others = (2, 0, (cell.states - 1) * 5) if cell.states > 1 else (0,)
    assert [tuple(o.shape) for o in outputs] == [
        (0, 10),
        (2, 0, 5),
        others,
        (2, 0, cell.saved * 5 + cell.row_numbers) if cell.saved else (0,),
        others,
    ]
    dgates, dh0, _, dh, dc, du = scan.kernel_backward(outputs, scan.gradients(outputs))
    assert dgates.shape == (2, 0, cell.gradients * 5)
    assert dh0.shape == (2, 0, 5)
    assert dh.shape == (2, 0, 5)
    assert dc.shape == others
    assert du.tolist() == torch.zeros(2 if cell.vectors else 0, cell.vectors, 5).tolist()


@pytest.mark.parametrize("name", CELL_NAMES)
def test_the_way_back_is_the_derivative_of_the_reference(name):
    """way_back.py, which judges the backward kernels, is itself judged by torch's derivative."""
    for form, P in itertools.product(FORMS.values(), (None, 2) if CELLS[name].hidden else (None,)):
        scan = make_scan(name, 4, 3, 5, D=2, P=P, **form)
        leaves = [scan.x, scan.h0, *scan.b_ih, *scan.u]
        for leaf in leaves:
            leaf.requires_grad_()
        outputs = scan.reference()
        gradients = scan.gradients(outputs, "first")
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None]
        ends, given = zip(*pairs, strict=True)
        expected = torch.autograd.grad(ends, leaves, given)
        detached = scan.map(torch.Tensor.detach)
        dgates, dh0, *_, du = detached.reference_backward(tuple(o.detach() for o in outputs), gradients)
        cell = CELLS[name]
        dgx = [_operators.input_gradients(cell, dgates[d]) for d in range(2)]
        dx = sum(dgx[d] @ w for d, w in enumerate(detached.w_ih)) if detached.w_ih else torch.cat(dgx, 1)
        torch.testing.assert_close(dx, expected[0])
        torch.testing.assert_close(dh0, expected[1])
        biases = [part.sum(0) for part in dgx] if detached.b_ih else []
        for found, exact in zip([*biases, *(du if detached.u else ())], expected[2:], strict=True):
            torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("name", CELL_NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_the_kept_gradients_are_the_derivatives_by_every_state(name, form, monkeypatch):
    """Autograd by the h_t and c_t inside the forward specification is the independent judge."""
    assemble, made = Rows.assemble, []

    def listed(layout, steps):
        made.append(steps)
        return assemble(layout, steps)

    for P in (None, 2) if CELLS[name].hidden else (None,):
        scan = make_scan(name, 4, 3, 5, D=2, P=P, **FORMS[form])
        scan.x.requires_grad_()
        made.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Rows, "assemble", listed)
            outputs = scan.reference()
        gradients = scan.gradients(outputs, "first")
        of_direction = CELLS[name].states  # lists
        detached = scan.map(torch.Tensor.detach)
        dh, dc = detached.kernel_backward(tuple(o.detach() for o in outputs), gradients)[3:5]
        found = [dh, *(dc.chunk(of_direction - 1, -1) if of_direction > 1 else ())]
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None]
        ends, given = zip(*pairs, strict=True)
        for which, kept in enumerate(found):
            for d in range(2):
                states = made[d * of_direction + which]
                expected = torch.autograd.grad(ends, states, given, retain_graph=True, materialize_grads=True)
                torch.testing.assert_close(kept[d], assemble(scan.layout, list(expected)))


# ---- Memory: kernels see numbers, not arrangements ----------------------------------------------------


def column_major(t):
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else every_other(t)


def every_other(t):
    return torch.stack((t, torch.full_like(t, float("nan"))), -1).flatten(-2)[..., ::2]


def inside_a_wider_one(t):
    wider = torch.full((*t.shape[:-1], t.shape[-1] + 3), float("nan"), dtype=t.dtype)
    wider[..., 1:-2] = t
    return wider[..., 1:-2]


@pytest.mark.parametrize("arrange", [column_major, every_other, inside_a_wider_one])
@pytest.mark.parametrize(("name", "P"), [*((name, None) for name in KINDS), ("lstm", 5)])
@pytest.mark.parametrize("B", [2, 6])
def test_strides_of_no_argument_matter(name, P, arrange, B):
    scan = make_scan(name, 4, B, 17, D=2, P=P)
    expected = scan.reference()
    strided = scan.map(arrange)
    assert_same(strided.kernel(), expected, NAMES)
    gradients = scan.gradients(expected)
    strided_outputs = tuple(arrange(o) if o.dim() > 1 and o.numel() else o for o in expected)
    strided_gradients = tuple(None if g is None else arrange(g) for g in gradients)
    assert_same(
        strided.kernel_backward(strided_outputs, strided_gradients),
        scan.reference_backward(expected, gradients),
        GRADIENT_NAMES,
    )


@pytest.mark.parametrize("name", CELL_NAMES)
def test_expanded_arguments_read_as_their_values(name):
    scan = make_scan(name, 4, 5, 7)

    def expand(t):
        return t[:1].expand(t.shape)

    expanded = scan.map(expand)
    copied = scan.map(lambda t: expand(t).clone())
    expected = copied.reference()
    assert_same(expanded.kernel(), expected, NAMES)
    ones = tuple(torch.ones(()).double().expand(o.shape) for o in expected[:2])
    gradients = (*ones, None, None, None)
    assert_same(
        expanded.kernel_backward(expected, gradients),
        copied.reference_backward(expected, gradients),
        GRADIENT_NAMES,
    )


@pytest.mark.parametrize("name", CELL_NAMES)
def test_arguments_are_never_written_to(name):
    scan = make_scan(name, 4, 5, 7, D=2)
    tensors = [scan.x, scan.h0, *itertools.chain(*scan.weights), *([scan.c0] if scan.c0 is not None else [])]
    before = [t.clone() for t in tensors]
    outputs = scan.kernel()
    gradients = scan.gradients(outputs)
    given = [*outputs, *(g for g in gradients if g is not None)]
    given_before = [t.clone() for t in given]
    scan.kernel_backward(outputs, gradients)
    for t, copy in zip([*tensors, *given], [*before, *given_before], strict=True):
        assert torch.equal(t, copy)


@pytest.mark.parametrize("name", CELL_NAMES)
def test_results_are_the_same_bits_every_time(name, threads):
    scan = make_scan(name, 20, 3, 200, D=2, dtype=torch.float32)
    first = scan.kernel()
    gradients = scan.gradients(first)
    first_backward = scan.kernel_backward(first, gradients)
    for _ in range(5):
        for a, b in zip(scan.kernel(), first, strict=True):
            assert torch.equal(a, b)
        for a, b in zip(scan.kernel_backward(first, gradients), first_backward, strict=True):
            assert torch.equal(a, b)


# ---- NaN and infinity --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CELL_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("B", [1, 5])
def test_nan_and_infinity_reach_what_they_reach_in_the_reference(name, dtype, poison, B):
    for where in range(4):
        scan = make_scan(name, 4, B, 21, dtype=dtype)
        biases = scan.b_ih[0].view(-1, 21) if scan.b_ih else scan.u[0]
        target = [scan.x[0], scan.h0[0, 0], biases[0], biases[-1]][where]
        target[2] = poison
        expected, got = scan.reference(), scan.kernel()
        for a, b in zip(got[:3], expected[:3], strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            assert torch.equal(a.isinf(), b.isinf())
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CELL_NAMES)
def test_a_nan_of_one_row_stays_in_its_row(name):
    scan = make_scan(name, 5, 8, 17)
    scan.h0[0, 3, 2] = float("nan")
    y = scan.kernel()[0].view(5, 8, 17)
    assert y[:, 3].isnan().any()
    others = torch.cat((y[:, :3], y[:, 4:]), 1)
    assert not others.isnan().any()


@pytest.mark.parametrize("name", CELL_NAMES)
def test_nan_gradients_reach_what_they_reach_in_the_reference(name):
    scan = make_scan(name, 4, 5, 21)
    outputs = scan.reference()
    gradients = scan.gradients(outputs, "first")
    gradients[0][7, 3] = float("nan")
    for a, b in zip(
        scan.kernel_backward(outputs, gradients),
        scan.reference_backward(outputs, gradients),
        strict=True,
    ):
        torch.testing.assert_close(a, b, equal_nan=True)


# ---- float32 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CELL_NAMES)
@pytest.mark.parametrize(("T", "B", "H"), [(30, 1, 65), (30, 9, 129), (100, 3, 17)])
def test_float32_is_as_close_to_float64_as_the_reference_in_float32(name, T, B, H):
    exact = make_scan(name, T, B, H)
    single = exact.map(torch.Tensor.float)
    expected, plain, ours = exact.reference(), single.reference(), single.kernel()
    # An sLSTM's exponentials pass on how the recurrent product was summed: with W_hh = 0 it is 1.
    most = 4 if name == "slstm" else 2
    for e, p, o in zip(expected, plain, ours, strict=True):
        assert (o - e).abs().mean() <= most * (p - e).abs().mean() + 1e-7 if e.numel() else True
    gradients = exact.gradients(expected, "first")
    rounded = tuple(None if g is None else g.float() for g in gradients)
    single_outputs = tuple(o.float() for o in expected)
    e = exact.reference_backward(expected, gradients)[0]
    p = single.reference_backward(single_outputs, rounded)[0]
    o = single.kernel_backward(single_outputs, rounded)[0]
    assert (o - e).abs().mean() <= 2 * (p - e).abs().mean() + 1e-7
