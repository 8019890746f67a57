"""register_state_gradient_hook gives dL/dh_t and dL/dc_t of every layer, direction and step."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn.reference import CELLS

T, B, I, H = 6, 4, 5, 7
LENGTHS = torch.tensor([3, 6, 1, 5])
KINDS = [
    ("LSTM", {}),
    ("LSTM", {"proj_size": 3}),
    ("GRU", {}),
    ("RNN", {}),
    ("RNN", {"nonlinearity": "relu"}),
]
FORMS = ["time_major", "batch_first", "packed", "lengths", "reset"]


def build(kind, options, **more):
    torch.manual_seed(0)
    return getattr(fastrnn, kind)(
        I, H, num_layers=2, bidirectional=True, dtype=torch.float64, **options, **more
    )


def run(module, x, form):
    """The loss of an ordinary call on x [T, B, I]: a fixed random weight on every output that counts."""
    weight = torch.randn(T, B, 2 * (module.proj_size or H), dtype=x.dtype, generator=torch.manual_seed(1))
    inside = (torch.arange(T)[:, None] < LENGTHS)[..., None] if form in ("packed", "lengths") else 1
    weight = weight * inside
    if form == "batch_first":
        return (module(x.transpose(0, 1))[0].transpose(0, 1) * weight).sum()
    if form == "packed":
        packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
        y, _ = torch.nn.utils.rnn.pad_packed_sequence(module(packed)[0])
        return (y * weight).sum()
    keywords = {"lengths": {"lengths": LENGTHS}, "reset": {"reset": reset_marks()}}.get(form, {})
    return (module(x, **keywords)[0] * weight).sum()


def reset_marks():
    return torch.rand(T, B, generator=torch.manual_seed(2)) < 0.3


def expected_gradients(module, x, form):
    """[layer][direction] -> (dh, dc) [T, B, *] by autograd through a loop over the cells' formulas."""
    cell, P = CELLS[module.mode.lower()], module.proj_size or H
    counts = torch.arange(T)[:, None] < (LENGTHS if form in ("packed", "lengths") else torch.full((B,), T))
    marks = reset_marks() if form == "reset" else torch.zeros(T, B, dtype=torch.bool)
    made, below = [], x
    for layer in range(2):
        outputs = []
        for direction in range(2):
            suffix = f"_l{layer}" + "_reverse" * direction
            w_ih, w_hh, b_ih, b_hh = (
                getattr(module, n + suffix) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            h, c = x.new_zeros(B, P), x.new_zeros(B, H)
            hs, cs = [None] * T, [None] * T
            for t in reversed(range(T)) if direction else range(T):
                h, c = (s.masked_fill(marks[t][:, None], 0) for s in (h, c))
                gates = (
                    (below[t] @ w_ih.T + b_ih).chunk(cell.gates, -1),
                    (h @ w_hh.T + b_hh).chunk(cell.gates, -1),
                )
                m, *others = cell.step(*gates, (h, c)[: cell.states])
                cs[t] = others[0] if others else None
                hs[t] = m @ getattr(module, "weight_hr" + suffix).T if module.proj_size else m
                h = torch.where(counts[t][:, None], hs[t], h)
                c = torch.where(counts[t][:, None], cs[t], c) if cell.states > 1 else c
            made.append((hs, cs if cell.states > 1 else []))
            outputs.append(torch.stack(hs))
        below = torch.cat(outputs, -1)
    weight = torch.randn(T, B, 2 * P, dtype=x.dtype, generator=torch.manual_seed(1)) * counts[..., None]
    loss = (below * weight).sum()
    flat = torch.autograd.grad(loss, [s for hs, cs in made for s in (*hs, *cs)])
    of_direction = 2 * T if cell.states > 1 else T
    parts = [flat[i * of_direction :][:of_direction] for i in range(4)]
    return [(torch.stack(p[:T]), torch.stack(p[T:]) if cell.states > 1 else None) for p in parts]


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_a_hook_hears_the_derivatives_by_every_state(kind, options, form):
    module = build(kind, options, batch_first=form == "batch_first")
    x = torch.randn(T, B, I, dtype=torch.float64)
    heard = []
    handle = module.register_state_gradient_hook(heard.append)
    loss = run(module, x, form)
    loss.backward()
    assert [g.layer for g in heard] == [1, 0]
    expected = expected_gradients(module, x, form)
    rank = torch.argsort(LENGTHS, descending=True) if form == "packed" else torch.arange(B)
    for gradients in heard:
        t, b = gradients.rows.places()
        for d in range(2):
            dh, dc = expected[2 * gradients.layer + d]
            ends = gradients.rows.ends()[b]
            for found, wanted in [(gradients.dh, dh), (gradients.dc, dc)]:
                assert (found is None) == (wanted is None)
                if found is not None:
                    torch.testing.assert_close(found[d][t < ends], wanted[t, rank[b]][t < ends])
                    assert not found[d][t >= ends].any()
    handle.remove()
    run(module, x, form).backward()
    assert len(heard) == 2


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_hook_changes_no_gradient(kind, options):
    module, x = build(kind, options), torch.randn(T, B, I, dtype=torch.float64)
    plain = torch.autograd.grad(run(module, x, "time_major"), module.parameters())
    module.register_state_gradient_hook(lambda gradients: None)
    loss = run(module, x, "time_major")
    torch.testing.assert_close(torch.autograd.grad(loss, module.parameters()), plain, rtol=0, atol=0)


def test_a_hook_hears_a_back_propagation_that_is_differentiated_again():
    module, x = build("LSTM", {}), torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    heard = []
    module.register_state_gradient_hook(heard.append)
    loss = run(module, x, "time_major")
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x, create_graph=True)
    torch.testing.assert_close(first, second)
    for a, b in zip(heard[:2], heard[2:], strict=True):
        torch.testing.assert_close((a.dh, a.dc), (b.dh, b.dc))
    assert torch.autograd.grad(second.square().sum(), x)[0].isfinite().all()


@pytest.mark.usefixtures("without_16_bit_kernels")
def test_a_hook_that_would_hear_nothing_is_refused():
    for dtype, call in [(torch.float64, torch.compile), (torch.bfloat16, lambda f: f)]:
        module = fastrnn.LSTM(I, H, dtype=dtype)
        module.register_state_gradient_hook(lambda gradients: None)
        with pytest.raises(RuntimeError, match="the gradients of the states come from the kernels"):
            call(module)(torch.randn(T, B, I, dtype=dtype))
