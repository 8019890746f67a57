"""The products after the backward scan, as an operator and as torch operations, and what they give."""

import pytest
import torch
from scans import CELL_NAMES, FORMS, KINDS, make_scan

import fastrnn
from fastrnn import _operators
from fastrnn.reference import CELLS

NAMES = ("dw_ih", "dw_hh", "db_ih", "db_hh")


def arguments(name, form, T=5, B=3, H=7, D=2, dtype=torch.float64, **options):
    scan = make_scan(name, T, B, H, D=D, dtype=dtype, **FORMS[form], **options)
    outputs = scan.kernel()
    dgates = scan.kernel_backward(outputs, scan.gradients(outputs, "all"))[0]
    return name, dgates, scan.x, outputs[0], scan.states, *_operators.given(scan.slots), *scan.rows


def assert_composed(products, given, tolerance):
    cell = CELLS[given[0]]
    dx, dweights = products(*given, not cell.takes_gates, True)
    dx_composed, dweights_composed = _operators.composed_weight_gradients(*given, not cell.takes_gates, True)
    ours, theirs = [*dx, *dweights], [*dx_composed, *dweights_composed]
    names = ["dx"] * len(dx) + [NAMES[slot] for slot in cell.product_slots] * len(given[4][0])
    for what, a, b in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, w=what: f"{w}: {m}")
    return ours


def assert_operator_is_composed(given, tolerance):
    assert_composed(torch.ops.fastrnn.weight_gradients, given, tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("T", "B", "H", "D"), [(1, 1, 3, 1), (1, 2, 17, 2), (5, 3, 7, 1), (5, 3, 7, 2)])
def test_what_cuda_takes_equals_torch_operations(name, form, T, B, H, D):
    found = assert_composed(_operators.weight_gradients_of_torch, arguments(name, form, T, B, H, D), 1e-11)
    assert len({t.untyped_storage().data_ptr() for t in found}) == len(found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("T", "B", "H"), [(1, 1, 3), (1, 2, 17), (5, 3, 7), (9, 65, 33), (40, 13, 65)])
def test_the_operator_equals_torch_operations(name, form, T, B, H):
    assert_operator_is_composed(arguments(name, form, T, B, H), 1e-11)


@pytest.mark.parametrize("name", CELL_NAMES)
@pytest.mark.parametrize(("T", "B"), [(1, 1), (3, 1), (1, 3), (2, 2), (9, 33)])
def test_threads_share_the_products_of_wide_layers(name, T, B, threads):
    # Enough work for several threads, however few the rows; the last units and columns are ragged.
    assert_operator_is_composed(arguments(name, "time_major", T, B, 301), 1e-10)


@pytest.mark.parametrize("form", ["reset", "lengths_batch_first", "packed", "batch_first"])
@pytest.mark.parametrize("stepwise", [False, True])
@pytest.mark.parametrize(("T", "B", "H"), [(2, 2, 3), (5, 3, 7), (9, 65, 33)])
def test_the_mask_of_h_and_the_states_of_a_reset_are_in_the_products(form, stepwise, T, B, H):
    scan = make_scan("gru", T, B, H, D=2, **FORMS[form])
    (*_, mask), to = scan.options(stepwise)
    given = arguments("gru", form, T, B, H)
    plain = torch.ops.fastrnn.weight_gradients(*given, True, True)[1]
    more = _operators.with_options((0.0,) * 4, (None, None, None, mask), to)
    dx, expected = _operators.composed_weight_gradients(*given, True, True, *more)
    assert not any(torch.allclose(a, b) for a, b in zip(plain[1::4], expected[1::4], strict=True))  # dw_hh
    for products in (torch.ops.fastrnn.weight_gradients, _operators.weight_gradients_of_torch):
        found = products(*given, True, True, *more)
        torch.testing.assert_close(found, (dx, expected), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", CELL_NAMES)
@pytest.mark.parametrize(("inputs", "weights"), [(True, True), (True, False), (False, True)])
def test_opcheck_accepts_the_operator(name, inputs, weights):
    torch.library.opcheck(
        torch.ops.fastrnn.weight_gradients.default,
        (*arguments(name, "time_major"), inputs and not CELLS[name].takes_gates, weights),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_no_two_gradients_share_memory(kind):
    # Clipping multiplies each gradient in place: shared ones would be scaled twice.
    module = getattr(fastrnn, kind)(3, 4)
    module(torch.randn(5, 2, 3))[0].sum().backward()
    storages = [p.grad.untyped_storage().data_ptr() for p in module.parameters()]
    assert len(set(storages)) == len(storages)


def test_clipping_scales_every_gradient_once():
    module = fastrnn.LSTM(3, 4, bidirectional=True)
    module(torch.randn(5, 2, 3))[0].sum().backward()
    before = [p.grad.clone() for p in module.parameters()]
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 0.01)
    for p, g in zip(module.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, g * (0.01 / (norm + 1e-6)))
