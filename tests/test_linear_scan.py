"""The linear scan against a loop in float64: values, forms of rows, derivatives, transforms, and the CUDA
kernels on the CPU."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import fastrnn
from fastrnn import _linear, functional
from fastrnn.functional import linear_scan
from fastrnn.rows import Rows

SIZES = [(1, 1, 1), (1, 5, 3), (7, 3, 17), (50, 1, 33), (9, 4, 64), (33, 2, 5)]  # T, B, H
LIMITS = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def loop(a, b, h0, *, reverse=False, lengths=None, reset=None, shifted=False):
    """Row by row and step by step, time-major: (h [T, B, H], last [B, H])."""
    T, B, _ = a.shape
    h, last = torch.zeros_like(b), h0.clone()
    for row in range(B):
        n = T if lengths is None else int(lengths[row])
        m = h0[row]
        for t in range(n - 1, -1, -1) if reverse else range(n):
            cut = reset is not None and bool(reset[t, row])
            if shifted:
                h[t, row] = m + b[t, row]
                m = torch.zeros_like(m) if cut else a[t, row] * h[t, row]
            else:
                m = b[t, row] if cut else a[t, row] * m + b[t, row]
                h[t, row] = m
        last[row] = m
    return h, last


def make(T, B, H, dtype=torch.float64, requires_grad=False):
    shapes = ((T, B, H), (T, B, H), (B, H))
    a, b, h0 = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    return [t.requires_grad_(requires_grad) for t in (a.tanh(), b, h0)]


def make_options(T, B, kind):
    """Without, with lengths, with resets, and with both."""
    options = {}
    if "lengths" in kind:
        options["lengths"] = torch.randint(0, T + 1, (B,))
    if "reset" in kind:
        options["reset"] = torch.rand(T, B) < 0.3
    return options


KINDS = ["dense", "lengths", "reset", "lengths and reset"]


def close(found, expected):
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=0, atol=LIMITS[found.dtype] * max(1, expected.abs().max())
    )


# ---- Values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_a_loop(sizes, kind, reverse, threads):
    a, b, h0 = make(*sizes)
    options = make_options(*sizes[:2], kind)
    expected, _ = loop(a, b, h0, reverse=reverse, **options)
    close(linear_scan(a, b, h0, reverse=reverse, **options), expected)
    if "reset" in options:
        options["reset"] = options["reset"].T
    found = linear_scan(
        *(t.transpose(0, 1) for t in (a, b)), h0, batch_first=True, reverse=reverse, **options
    )
    close(found.transpose(0, 1), expected)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("sizes", [(400, 1, 130), (200, 7, 33), (100, 16, 128)], ids=str)
def test_work_that_is_shared_by_threads_equals_a_loop(sizes, batch_first, threads):
    a, b, h0 = make(*sizes, dtype=torch.float32)
    expected, _ = loop(a.double(), b.double(), h0.double())
    order = (1, 0, 2) if batch_first else (0, 1, 2)
    found = linear_scan(a.permute(order).contiguous(), b.permute(order), h0, batch_first=batch_first)
    close(found.permute(order), expected)


@pytest.mark.parametrize("dtype", list(LIMITS))
def test_every_dtype(dtype):
    a, b, h0 = make(40, 3, 9, dtype)
    found = linear_scan(a, b, h0)
    assert found.dtype is dtype
    close(found, loop(a.double(), b.double(), h0.double())[0])


def test_without_h0_the_state_begins_at_zero():
    a, b, _ = make(5, 3, 4)
    assert torch.equal(linear_scan(a, b), linear_scan(a, b, torch.zeros(3, 4).double()))


@pytest.mark.parametrize("sizes", [(5, 0, 3), (5, 2, 0)], ids=str)
def test_without_rows_or_units_there_is_nothing_to_compute(sizes):
    a, b, h0 = make(*sizes, requires_grad=True)
    h = linear_scan(a, b, h0)
    assert h.shape == sizes
    h.sum().backward()
    assert a.grad.shape == sizes


def test_strided_inputs():
    both = torch.randn(6, 3, 10, dtype=torch.float64)
    (a, b), h0 = both.chunk(2, -1), torch.randn(5, 3, dtype=torch.float64).T
    close(linear_scan(a, b, h0), loop(a, b, h0)[0])
    a, b = (t.expand(6, 3, 5) for t in torch.randn(2, 3, 1, dtype=torch.float64))
    close(linear_scan(a, b, h0), loop(a, b, h0)[0])


@pytest.mark.parametrize("reverse", [False, True])
def test_a_packed_sequence_gives_the_rows_of_a_dense_one_with_lengths(reverse):
    lengths = torch.tensor([6, 4, 4, 1])
    a, b, h0 = make(6, 4, 5)
    sizes = (torch.arange(6)[:, None] < lengths).sum(1)
    taken = torch.arange(6)[:, None] < lengths
    expected, last = loop(a, b, h0, reverse=reverse, lengths=lengths)
    rows = Rows(6, 4, batch_sizes=sizes)
    for scan in (_linear.scan, _linear.composed):
        h, end = scan(a[taken], b[taken], h0, rows, reverse)
        close(h, expected[taken])
        close(end, last)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_path_of_torch_operations_equals_a_loop(kind, reverse):
    a, b, h0 = make(7, 4, 3)
    options = make_options(7, 4, kind)
    reset = options["reset"].flatten() if "reset" in options else None
    rows = Rows(7, 4, lengths=options.get("lengths"), reset=reset)
    found = _linear.composed(a.flatten(0, 1), b.flatten(0, 1), h0, rows, reverse)
    for part, expected in zip(found, loop(a, b, h0, reverse=reverse, **options), strict=True):
        close(part.view_as(expected), expected)


# ---- NaN -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
def test_nan_beyond_the_lengths_reaches_nothing(reverse):
    a, b, h0 = make(5, 3, 4)
    lengths = torch.tensor([5, 0, 2])
    beyond = torch.arange(5)[:, None] >= lengths
    expected, _ = loop(a, b, h0, reverse=reverse, lengths=lengths)
    a[beyond] = b[beyond] = float("nan")
    tensors = [t.requires_grad_() for t in (a, b, h0)]
    h = linear_scan(*tensors, reverse=reverse, lengths=lengths)
    close(h, expected)
    dh = torch.randn_like(h)
    dh[beyond] = float("nan")
    for gradient in torch.autograd.grad(h, tensors, dh):
        assert not gradient.isnan().any()


def test_nan_before_a_reset_does_not_pass_it():
    a, b, h0 = make(6, 2, 3)
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[3] = True
    a[2:4] = h0[:] = float("nan")
    rows = Rows(6, 2, reset=reset.flatten())
    composed, _ = _linear.composed(a.flatten(0, 1), b.flatten(0, 1), h0, rows, False)
    for h in (linear_scan(a, b, h0, reset=reset), composed.view(6, 2, 3)):
        assert h[:3].isnan().all()
        assert not h[3:].isnan().any()
        close(h[3:], loop(a, b, h0, reset=reset)[0][3:])


def test_nan_passes_a_factor_of_zero_as_it_does_in_the_formula():
    a, b, h0 = make(3, 1, 2)
    b[0], a[1] = float("nan"), 0
    assert linear_scan(a, b, h0).isnan().all()


# ---- Derivatives and transforms ------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("kind", "batch_first"), [*((kind, False) for kind in KINDS), ("lengths and reset", True)]
)
def test_derivatives_equal_differences(kind, reverse, batch_first):
    T, B, H = 4, 3, 2
    tensors = make(T, B, H, requires_grad=True)
    options = make_options(T, B, kind)
    if batch_first and "reset" in options:
        options["reset"] = options["reset"].T

    def scan(a, b, h0):
        if batch_first:
            a, b = a.transpose(0, 1), b.transpose(0, 1)
        return linear_scan(a, b, h0, reverse=reverse, batch_first=batch_first, **options)

    assert torch.autograd.gradcheck(scan, tensors, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(scan, tensors, check_batched_grad=True)


@pytest.mark.parametrize("reverse", [False, True])
def test_derivatives_of_the_last_state_and_of_packed_rows_equal_differences(reverse):
    sizes = torch.tensor([3, 2, 1])
    rows = Rows(3, 3, batch_sizes=sizes)
    tensors = [torch.randn(n, 2, dtype=torch.float64, requires_grad=True) for n in (6, 6, 3)]

    def scan(a, b, h0):
        return _linear.scan(a, b, h0, rows, reverse)

    assert torch.autograd.gradcheck(scan, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(scan, tensors)


def test_only_what_is_asked_for_is_derived():
    a, b, h0 = make(4, 3, 2)
    expected = torch.autograd.grad(linear_scan(*(t.requires_grad_() for t in (a, b, h0))).sum(), (a, b, h0))
    for i, t in enumerate((a, b, h0)):
        alone = [s if s is t else s.detach() for s in (a, b, h0)]
        assert torch.equal(*torch.autograd.grad(linear_scan(*alone).sum(), t), expected[i])


@pytest.mark.parametrize("kind", KINDS)
def test_hessian_in_every_mode_is_that_of_a_loop(kind):
    a, b, h0 = make(3, 2, 2)
    options = make_options(3, 2, kind)

    def energy(scan):
        return lambda a: scan(a, b, h0, **options).square().sum()

    expected = jacrev(jacrev(energy(torch_loop)))(a)
    for derive in (hessian, lambda f: jacrev(jacfwd(f)), lambda f: jacfwd(jacfwd(f))):
        torch.testing.assert_close(derive(energy(linear_scan))(a), expected)


def torch_loop(a, b, h0, lengths=None, reset=None):
    """The loop without writing into tensors."""
    h, steps = h0, []
    for t in range(len(a)):
        m = h if reset is None else torch.where(reset[t, :, None], 0, h)
        new = a[t] * m + b[t]
        alive = torch.ones(len(h0), 1) > 0 if lengths is None else t < lengths[:, None]
        h = torch.where(alive, new, h)
        steps.append(torch.where(alive, new, 0))
    return torch.stack(steps)


def test_tangent_of_one_input():
    a, b, h0 = make(5, 2, 3)
    along = torch.randn_like(b)
    with forward_ad.dual_level():
        h = linear_scan(a, forward_ad.make_dual(b, along), h0)
        tangent = forward_ad.unpack_dual(h).tangent
    close(tangent, loop(a, along, torch.zeros_like(h0))[0])


@pytest.mark.parametrize("batch_first", [False, True])
def test_vmap_over_all_arguments_equals_one_call_each(batch_first):
    V, T, B, H = 3, 5, 2, 4
    T_and_B = (B, T) if batch_first else (T, B)
    a, b = (torch.randn(V, *T_and_B, H, dtype=torch.float64) for _ in range(2))
    h0 = torch.randn(B, H, dtype=torch.float64)
    lengths, reset = torch.randint(0, T + 1, (V, B)), torch.rand(V, *T_and_B) < 0.3

    def scan(a, b, lengths, reset):
        return linear_scan(a, b, h0, batch_first=batch_first, lengths=lengths, reset=reset)

    def loss(*arguments):
        return scan(*arguments).sin().sum()

    arguments = (a, b, lengths, reset)
    for f in (scan, grad(loss), grad(lambda *t: grad(loss, argnums=1)(*t).sin().sum())):
        found = vmap(f)(*arguments)
        torch.testing.assert_close(found, torch.stack([f(*one) for one in zip(*arguments, strict=True)]))
    moved = vmap(scan, in_dims=(1, None, 0, 0), out_dims=1)(a.movedim(0, 1), b[0], lengths, reset)
    each = [scan(one, b[0], n, r) for one, n, r in zip(a, lengths, reset, strict=True)]
    torch.testing.assert_close(moved.movedim(1, 0), torch.stack(each))


@pytest.mark.parametrize("kind", ["dense", "lengths and reset"])
def test_compiles_into_one_graph(kind):
    options = make_options(5, 3, kind)

    def gradients(scan):
        tensors = make(5, 3, 4, requires_grad=True)
        h = scan(*tensors)
        return h, *torch.autograd.grad(h.sin().sum(), tensors)

    def scan(a, b, h0):
        return linear_scan(a * 1, b, h0, **options)

    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    for reverse in (False, True):
        options["reverse"] = reverse
        torch.manual_seed(1)
        expected = gradients(scan)
        torch.manual_seed(1)
        for found, right in zip(gradients(compiled), expected, strict=True):
            torch.testing.assert_close(found, right)


def test_operator_passes_torchs_own_checks():
    a, b = torch.randn(2, 6, 4)
    arguments = (a, b, torch.randn(3, 4), None, torch.tensor([2, 0, 1]), None, False, False, False)
    torch.library.opcheck(
        torch.ops.fastrnn.linear_scan.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


# ---- Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": torch.zeros(4, 3)}, ValueError, r"a must be \[T, B, H\], got \[4, 3\]"),
        ({"b": torch.zeros(4, 3, 1)}, ValueError, r"b must have the shape of a, \[4, 3, 2\], got"),
        ({"h0": torch.zeros(1, 3, 2)}, ValueError, r"h0 must be \[B, H\] = \[3, 2\], got \[1, 3, 2\]"),
        ({"h0": torch.zeros(3, 2).double()}, RuntimeError, r"h0 must be torch.float32 on cpu, as a"),
        ({"lengths": [1, 2]}, ValueError, r"lengths must be \[B\] = \[3\]"),
        ({"lengths": [1, 2, 5]}, ValueError, r"lengths must be between 0 and T = 4"),
        ({"lengths": [1.0, 2, 3]}, TypeError, r"lengths must be integers"),
        ({"reset": torch.zeros(4, 3)}, TypeError, r"reset must be bool"),
        ({"reset": torch.zeros(3, 4) > 0}, ValueError, r"reset must be \[T, B\] = \[4, 3\], got \[3, 4\]"),
        ({"a": torch.zeros(0, 3, 2), "b": torch.zeros(0, 3, 2)}, ValueError, r"at least one step, got T = 0"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(change, error, message):
    arguments = {"a": torch.zeros(4, 3, 2), "b": torch.zeros(4, 3, 2), "h0": torch.zeros(3, 2)} | change
    with pytest.raises(error, match=message):
        linear_scan(**arguments)


def test_operator_refuses_what_would_read_out_of_bounds():
    scan, h0 = torch.ops.fastrnn.linear_scan, torch.zeros(3, 2)
    rest = (None, None, None, False, False, False)
    with pytest.raises(RuntimeError, match=r"a must be \[N, H\] = \[6, 2\], got \[3, 2\]"):
        scan(torch.zeros(3, 2), torch.zeros(6, 2), h0, *rest)
    with pytest.raises(RuntimeError, match="b must have the dtype of h0"):
        scan(torch.zeros(6, 2), torch.zeros(6, 2).double(), h0, *rest)
    with pytest.raises(RuntimeError, match="x must have T\\*B rows for B = 3, got 7"):
        scan(torch.zeros(7, 2), torch.zeros(7, 2), h0, *rest)


def test_a_dtype_without_a_kernel_takes_torch_operations_and_says_so(monkeypatch):
    a, b, h0 = make(5, 3, 4)
    monkeypatch.setattr(functional, "_KERNEL_DTYPES", (torch.float32,))
    monkeypatch.setattr(functional, "_warned", set())
    with pytest.warns(fastrnn.FallbackWarning, match="a path of torch operations"):
        close(linear_scan(a, b, h0), loop(a, b, h0)[0])
    monkeypatch.setattr(functional, "_strict", True)
    with pytest.raises(RuntimeError, match="strict"):
        linear_scan(a, b, h0)


# ---- The CUDA kernels on the CPU -----------------------------------------------------------------------


@pytest.fixture(params=[(132, "fifo"), (132, "random"), (1, "lifo"), (0, "random")], ids=str)
def host(request, on_host):
    """The operator on devices so large that a sequence is cut into many chunks, or few, or none."""
    import test_cuda_kernels as kernels

    multiprocessors, order = request.param
    kernels.Device(multiprocessors=multiprocessors, order=order).take("f32")
    return kernels.HOST.linear_scan


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_kernels_equal_a_loop(host, kind, reverse, shifted):
    for T, B, H, dtype in [(1, 2, 3, torch.float32), (70, 3, 5, torch.float64), (200, 2, 7, torch.float32)]:
        a, b, h0 = make(T, B, H, dtype)
        options = make_options(T, B, kind)
        expected = loop(*(t.double() for t in (a, b, h0)), reverse=reverse, shifted=shifted, **options)
        reset = options.get("reset")
        rows = [options.get("lengths"), None if reset is None else reset.flatten()]
        found = host(a.flatten(0, 1), b.flatten(0, 1), h0, None, *rows, False, reverse, shifted)
        for part, right in zip(found, expected, strict=True):
            close(part.view_as(right), right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cuda_kernels_sum_16_bit_numbers_in_float32(host, dtype):
    a, b, h0 = (
        torch.ones(512, 1, 1, dtype=dtype),
        torch.full((512, 1, 1), 2**-6, dtype=dtype),
        torch.ones(1, 1),
    )
    h, last = host(a[:, 0], b[:, 0], h0.to(dtype), None, None, None, False, False, False)
    assert last.item() == 9  # 1 + 512/64; in 16 bits 1 + 1/64 + 1/64 ... stops early in bfloat16
    assert h[-1].item() == 9


def test_cuda_kernels_take_packed_and_batch_first_rows(host):
    lengths = torch.tensor([80, 41, 40, 3])
    a, b, h0 = make(80, 4, 5)
    taken = torch.arange(80)[:, None] < lengths
    for reverse in (False, True):
        expected, last = loop(a, b, h0, reverse=reverse, lengths=lengths)
        h, end = host(a[taken], b[taken], h0, taken.sum(1), None, None, False, reverse, False)
        close(h, expected[taken])
        close(end, last)
        turned = [t.transpose(0, 1).flatten(0, 1) for t in (a, b)]
        h, end = host(*turned, h0, None, lengths, None, True, reverse, False)
        close(h.view(4, 80, 5).transpose(0, 1), expected)
        close(end, last)


def test_cuda_kernels_forget_nan_at_a_reset_in_an_earlier_chunk(host):
    a, b, h0 = make(100, 1, 3)
    reset = torch.zeros(100, 1, dtype=torch.bool)
    reset[20], a[10], h0[:] = True, float("nan"), float("nan")
    expected, last = loop(a, b, h0, reset=reset)
    h, end = host(a[:, 0], b[:, 0], h0, None, None, reset[:, 0], False, False, False)
    torch.testing.assert_close(h, expected[:, 0], equal_nan=True)
    close(end, last)
