"""The options that act on the states between steps, as loops in float64 written from the papers."""

import torch
from torch import nn
from torch.nn.functional import dropout

import fastrnn

LAYERS = ["LSTM", "GRU", "RNN"]
CELLS = ["LSTMCell", "GRUCell", "RNNCell"]
T, B, I, H = 5, 3, 3, 4


def make(kind, dtype=torch.float64, **options):
    return getattr(fastrnn, kind)(I, H, dtype=dtype, **options)


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def make_input(kind, *more):
    return randn(*more, *((B, I) if kind.endswith("Cell") else (T, B, I)))


def flat(result):
    y, h = result
    return [y, *h] if isinstance(h, tuple) else [y, h]


# ---- The papers, one sequence and one step at a time ---------------------------------------------------


def two(p):
    return p if isinstance(p, tuple) else (p, p)


def draw(module, N, widths):
    """The masks of one layer in the order in which a call draws them; N is (T, B), or (N,) packed."""
    o, D = module._fused_options, 2 if getattr(module, "bidirectional", False) else 1
    masks = {}

    def mask(name, p, *shape):
        if p > 0 and module.training:
            masks[name] = dropout(torch.ones(*shape, dtype=torch.float64), p)

    zoneout, (p_x, p_h) = two(o.get("zoneout", 0.0)), two(o.get("variational_dropout", 0.0))
    mask("x", p_x, B, widths["x"])
    mask("zoneout_h", zoneout[0], D, *N, widths["h"])
    if "c" in widths:
        mask("zoneout_c", zoneout[1], D, *N, widths["c"])
    mask("candidate", o.get("recurrent_dropout", 0.0), D, *N, H)
    mask("h", p_h, D, B, widths["h"])
    return masks


def zoned(p, mask, old, new):
    """Krueger et al. (2017): d * old + (1 - d) * new with P(d = 1) = p; p itself in evaluation."""
    d = p if mask is None else (mask == 0).double()
    return d * old + (1 - d) * new


def clipped_gradient(v, state):
    if v is not None and state.requires_grad:
        state.register_hook(lambda g: g.clamp(-v, v))  # of the complete gradient
    return state


def step(kind, o, p, masks, x, states):
    """x [I] and the states of one row; masks: those of this row and step."""
    h = states[0]
    v, zoneout = o.get("state_gradient_clip"), two(o.get("zoneout", 0.0))
    w_hh = p["weight_hh"]
    if "heads" in o:
        gates = [torch.block_diag(*w.split(H // o["heads"])) for w in w_hh.split(H)]
        w_hh = torch.cat(gates)
    drop = lambda g: g * masks.get("candidate", 1.0)  # noqa: E731  Semeniuta et al. (2016)
    gx = p["weight_ih"] @ x + p.get("bias_ih", 0.0)
    gh = w_hh @ (h * masks.get("h", 1.0)) + p.get("bias_hh", 0.0)  # Gal and Ghahramani (2016)
    if "RNN" in kind:
        return (clipped_gradient(v, zoned(zoneout[0], masks.get("zoneout_h"), h, torch.tanh(gx + gh))),)
    if "GRU" in kind:
        (xr, xz, xn), (hr, hz, hn) = gx.reshape(3, -1), gh.reshape(3, -1)
        z = torch.sigmoid(xz + hz)
        n = (1 - z) * drop(torch.tanh(xn + torch.sigmoid(xr + hr) * hn)) + z * h
        return (clipped_gradient(v, zoned(zoneout[0], masks.get("zoneout_h"), h, n)),)
    c = states[1]
    i, f, g, o_ = (gx + gh).reshape(4, -1)
    peepholes = [p.get(f"weight_c{gate}", torch.zeros(H, dtype=torch.float64)) for gate in "ifo"]
    i, f = torch.sigmoid(i + peepholes[0] * c), torch.sigmoid(f + peepholes[1] * c)
    new = f * c + i * drop(torch.tanh(g))
    if "cell_clip" in o:
        new = new.clamp(-o["cell_clip"], o["cell_clip"])
    if zoneout[1] == 0:
        new = clipped_gradient(v, new)
    new_h = torch.sigmoid(o_ + peepholes[2] * new) * torch.tanh(new)
    if "weight_hr" in p:
        new_h = p["weight_hr"] @ new_h
    if zoneout[1] > 0:
        new = clipped_gradient(v, zoned(zoneout[1], masks.get("zoneout_c"), c, new))
    return clipped_gradient(v, zoned(zoneout[0], masks.get("zoneout_h"), h, new_h)), new


def loop(module, x, hx=None, lengths=None, reset=None, reset_to=None, packed=False):
    """[y [T, B, D*P], the last states, every state [T, L*D, B, *]] time-major, zeros in padding. reset_to:
    [T, L*D, B, *] of each state. packed: the masks have rows of a packed sequence."""
    kind, o = type(module).__name__, module._fused_options
    ways = ["", "_reverse"] if module.bidirectional else [""]
    widths = {"h": module.proj_size or H} | ({"c": H} if kind == "LSTM" else {})
    lengths = [len(x)] * B if lengths is None else lengths.tolist()
    sizes = [sum(n > t for n in lengths) for t in range(len(x))]
    ranks = sorted(range(B), key=lambda b: -lengths[b])
    last, every = [], []
    for k in range(module.num_layers):
        masks = draw(module, (sum(sizes),) if packed else (len(x), B), widths | {"x": x.shape[2]})
        ys = []
        for d, way in enumerate(ways):
            suffix, place = f"_l{k}{way}", k * len(ways) + d
            p = {n.removesuffix(suffix): w for n, w in module.named_parameters() if n.endswith(suffix)}
            all_states = [[[x.new_zeros(w)] * B for _ in x] for w in widths.values()]
            ends = []
            for b, length in enumerate(lengths):
                rank = ranks.index(b)
                states = [
                    x.new_zeros(w) if hx is None else hx[i][place, b] for i, w in enumerate(widths.values())
                ]
                times = list(range(length))
                for s, t in enumerate(reversed(times) if way or o.get("reverse") else times):
                    m = s if o.get("reverse") else t  # masks lie in the order of the steps
                    at = {n: w[d, m, b] for n, w in masks.items() if w.dim() == 4}
                    if packed:
                        rows = {n: w for n, w in masks.items() if n not in ("x", "h")}
                        at = {n: w[d, sum(sizes[:m]) + rank] for n, w in rows.items()}
                    if "h" in masks:
                        at["h"] = masks["h"][d, rank if packed else b]
                    if reset is not None and reset[t, b]:
                        states = [torch.zeros_like(h) for h in states]
                        if reset_to is not None:
                            states = [to[t, place, b] for to in reset_to]
                    now = x[t, b] * masks["x"][rank if packed else b] if "x" in masks else x[t, b]
                    states = step(kind, o, p, at, now, states)
                    for of_all, state in zip(all_states, states, strict=True):
                        of_all[t][b] = state
                ends.append(states)
            stacked = [torch.stack([torch.stack(at) for at in of_all]) for of_all in all_states]
            last.append([torch.stack(parts) for parts in zip(*ends, strict=True)])
            every.append(stacked)
            ys.append(stacked[0])
        x = torch.cat(ys, -1)
    last = [torch.stack(parts) for parts in zip(*last, strict=True)]
    return x, last, [torch.stack(parts, 1) for parts in zip(*every, strict=True)]


def assert_same_with_gradients(found, expected, wanted):
    torch.testing.assert_close(list(found), list(expected))
    weights = [torch.randn_like(e) for e in expected]
    gradients = [
        torch.autograd.grad(
            sum((o * w).sum() for o, w in zip(out, weights, strict=True)),
            wanted,
            retain_graph=True,
            materialize_grads=True,
        )
        for out in (found, expected)
    ]
    torch.testing.assert_close(*gradients)


def seeded(function, *args, **keywords):
    torch.manual_seed(5)
    return function(*args, **keywords)


def initial(module, B=B):
    LD = module.num_layers * (2 if module.bidirectional else 1)
    widths = [module.proj_size or H, H][: 2 if isinstance(module, nn.LSTM) else 1]
    return [randn(LD, B, w).requires_grad_() for w in widths]


def as_hx(states):
    return tuple(states) if len(states) > 1 else states[0]


SINGLE = {
    "zoneout": 0.3,
    "recurrent_dropout": 0.4,
    "variational_dropout": 0.4,
    "cell_clip": 0.2,
    "state_gradient_clip": 0.15,
    "heads": 2,
    "reverse": True,
}
NOT_OF = {"LSTM": set(), "GRU": {"cell_clip"}, "RNN": {"cell_clip", "recurrent_dropout"}}
NOT_OF_CELLS = {"variational_dropout", "reverse"}


def options_of(kind):
    missing = NOT_OF[kind.removesuffix("Cell")] | (NOT_OF_CELLS if kind.endswith("Cell") else set())
    return {name: value for name, value in SINGLE.items() if name not in missing}


EVERYTHING = [(kind, options_of(kind)) for kind in LAYERS + CELLS]
